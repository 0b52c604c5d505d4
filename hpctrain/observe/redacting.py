"""Secrets (tokens, passwords, keys) redacted: in text, command lines and copies of configs.

A bundle is sent to a support desk, and a run folder, its checkpoints and its report are read by
others.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

from hpctrain.config import Config, to_toml
from hpctrain.errors import ConfigError

REDACTED = "[redacted]"

_SECRET_VARIABLE = re.compile(
    r"TOKEN|PASS|SECRET|KEY|CRED|AUTH|COOKIE|PRIVATE|SIGN|JWT", re.IGNORECASE
)
_SECRET_VALUE = re.compile(r"://[^/\s]*@|\bBearer\b|-----BEGIN", re.IGNORECASE)
_SECRET_WORD = re.compile(
    r"((?:^|[\W_])(?:token|password|passwd|secret|credentials?|(?:api|access|secret)_?key)\s*=).*",
    re.IGNORECASE | re.DOTALL,
)
_NOT_RECORDED = "(not recorded)"

# All repetitions have a bound, and what comes before a name stays in any case, so it is not looked
# for: no text takes longer than its length asks for.
_SECRET_NAME = (
    r"(?:passw(?:or)?d|passphrase|pwd|secret|token|credential|authorization"
    r"|cookie|api[_-]?key|access[_-]?key|private[_-]?key|signature|netrc)[\w.-]{0,60}"
)
_IS = r"[\"']?\s{0,20}[:=]\s{0,20}"
_PLAIN = re.compile(r"null|none|true|false", re.I)
_NUMBER = re.compile(r"[\d.,_]+")

# Each has the part that stays as its first group, which may be empty.
_PATTERNS = tuple(
    re.compile(pattern, flags)
    for pattern, flags in (
        # Keys as OpenSSH and OpenSSL write them.
        (r"()-----BEGIN [A-Z ]{0,40}PRIVATE KEY-----.*?(?:-----END [A-Z ]{0,40}KEY-----|\Z)", re.S),
        # https://user:password@host, and a token alone in its place.
        (r"(\b[a-zA-Z][\w+.-]{0,20}://)[^\s/@\"'<>]{1,500}(?=@)", 0),
        (r"(\b(?:Bearer|Basic|Token)\s{1,20})[\w.~+/=-]{8,}", re.I),
        # name = value, "name": "value", --name value, name=value in an address.
        (rf"({_SECRET_NAME}{_IS})\"(?:[^\"\\\n]|\\.)*\"", re.I),
        (rf"({_SECRET_NAME}{_IS})'[^'\n]*'", re.I),
        (rf"({_SECRET_NAME}{_IS})[^\s\"'&,;}}\]\[]+", re.I),
        (rf"(--[\w.-]{{0,60}}?{_SECRET_NAME}\s{{1,20}})[^\s\"'-][^\s\"']*", re.I),
        (r"([?&](?:sig|key|auth|code)=)[^\s&\"']+", re.I),
        # By their shape: AWS, GitHub, GitLab, Hugging Face, Slack, OpenAI and others, W&B, JWT.
        (r"()\b(?:AKIA|ASIA|ABIA|ACCA)[0-9A-Z]{16}\b", 0),
        (r"()\b(?:gh[pousr]_|github_pat_|glpat-|hf_|xox[abeoprs]-|sk-|wandb_v1_)[\w-]{16,}", 0),
        (r"()\beyJ[\w-]{8,4000}\.[\w-]{8,4000}\.[\w-]{0,4000}", 0),
    )
)

# Forty hexadecimal digits are a key of Weights & Biases, or a commit, which helps to know.
_FORTY_DIGITS = re.compile(r"(commit\W{1,6})?\b[0-9a-f]{40}\b", re.I)


def redact(text: str) -> tuple[str, int]:
    """Return text without what looks like a secret, and how many were taken out."""
    before = text.count(REDACTED)
    for pattern in _PATTERNS:
        text = pattern.sub(_replaced, text)
    text = _FORTY_DIGITS.sub(lambda found: found[0] if found[1] else REDACTED, text)
    return text, text.count(REDACTED) - before


def _replaced(found: re.Match[str]) -> str:
    value = found[0][len(found[1]) :]
    # Counts of tokens are what language models are measured by.
    is_count = "token" in found[1].lower() and _NUMBER.fullmatch(value)
    if value == REDACTED or is_count or _PLAIN.fullmatch(value):
        return found[0]
    return found[1] + REDACTED


def is_secret(name: str, value: str) -> bool:
    """Tell whether an environment variable looks like one that could open a door."""
    return _SECRET_VARIABLE.search(name) is not None or _SECRET_VALUE.search(value) is not None


def without_secrets(words: list[str]) -> list[str]:
    """Return a command line with what looks like a secret in it left out."""
    hidden = [_SECRET_WORD.sub(rf"\1{_NOT_RECORDED}", word) for word in words]
    return [_NOT_RECORDED if _SECRET_VALUE.search(word) else word for word in hidden]


# Whoever knows the path of a webhook may post there: no name says that it is a secret.
_ADDRESS = re.compile(r"\b([a-zA-Z][\w+.-]{0,20}://[^\s/?#\"'<>]{1,500})[/?#][^\s\"'<>]+")
_LOGIN_OPTIONS = ("-u", "--user", "-U", "--proxy-user")
"""Of curl and its like: the next word is "name:password"."""


def toml_for_others(config: Config) -> str:
    """Return a config as it is kept in a run folder and in checkpoints, where others read it.

    What makes the run what it is stays as it is; secrets among the arguments of trackers and in
    the command of `[notify]` do not.

    Raises:
        ConfigError: if it is such a copy itself: its trackers would log in with a placeholder.
    """
    for number, tracker in enumerate(config.trackers, start=1):
        if name := _name_of_placeholder(tracker.arguments):
            _refuse(f"trackers, number {number}: {name}")
    if any(REDACTED in word for word in config.notify.command):
        _refuse("notify.command")
    trackers = tuple(
        dataclasses.replace(each, arguments=_hidden("", each.arguments)) for each in config.trackers
    )
    command = tuple(_hidden_words(config.notify.command))
    notify = dataclasses.replace(config.notify, command=command)
    return to_toml(dataclasses.replace(config, trackers=trackers, notify=notify))


def _refuse(place: str) -> None:
    raise ConfigError(
        f"{place} = {REDACTED}: this config is the copy of a run, which holds no secrets\n"
        "  fix: take the config that the run was started with, or give the value anew"
    )


def _name_of_placeholder(value: Any, name: str = "") -> str | None:
    if isinstance(value, dict):
        found = (_name_of_placeholder(item, str(key)) for key, item in value.items())
        return next(filter(None, found), None)
    if isinstance(value, list | tuple):
        return next(filter(None, (_name_of_placeholder(item, name) for item in value)), None)
    return name if isinstance(value, str) and REDACTED in value else None


def _hidden(name: str, value: Any) -> Any:
    """Return the value of an argument without secrets, of any nesting."""
    if isinstance(value, dict):
        return {key: _hidden(f"{name} {key}", item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_hidden(name, item) for item in value]
    if not isinstance(value, str) or not value:
        return value
    return REDACTED if _SECRET_VARIABLE.search(name) else redact(value)[0]


def _hidden_words(words: Sequence[str]) -> list[str]:
    """Return a command without secrets, the paths of addresses among them."""
    hidden = []
    for before, word in zip(("", *words), words, strict=False):
        named = f"{before} {word}" if before.startswith("--") else word
        cut = redact(named)[0]
        cut = cut[len(before) + 1 :] if named is not word else cut
        cut = _ADDRESS.sub(rf"\1/{REDACTED}", cut)
        hidden.append(REDACTED if before in _LOGIN_OPTIONS else cut)
    return hidden
