"""Secrets in text, taken out of it: what is sent to a support desk goes through many hands."""

from __future__ import annotations

import re

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
