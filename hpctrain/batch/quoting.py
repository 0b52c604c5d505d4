"""What may stand in a job script: plain values in directives, words that bash takes as they are.

A scheduler reads its directives line by line and splits them at spaces; bash reads all the rest. So
a value with a line feed is refused wherever it would stand, be it in a comment; a directive takes
plain characters only; and what bash sees is quoted.
"""

from __future__ import annotations

import re
import shlex

from hpctrain.errors import UsageError

_LONGEST_VALUE = 255
"""Characters of an account, a queue or a job's name; schedulers take fewer."""
_LONGEST_WORD = 4096
"""Characters of a path, by Linux, and of whatever else a script names."""

_PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.,:@/+=-]*", re.ASCII)
_SHOWN = 60


def plain_value(text: str, what: str) -> str:
    """Return the value of a directive, such as an account.

    Args:
        text: the value.
        what: where it comes from, for the message.

    Raises:
        UsageError: if it is empty, or not one plain word.
    """
    if len(text) > _LONGEST_VALUE or not _PLAIN.fullmatch(text):
        raise UsageError(
            f"{what} {_shown(text)}: expected one word of letters, digits and _ . , : @ / + = -, "
            f"at most {_LONGEST_VALUE}, that begins with a letter, a digit or _: it becomes part "
            "of the script's directives"
        )
    return text


def require_line(text: str, what: str) -> str:
    """Return a value that may stand in a comment, or quoted in a command.

    Args:
        text: the value.
        what: where it comes from, for the message.

    Raises:
        UsageError: if it is not one line of characters that can be seen.
    """
    if not text or len(text) > _LONGEST_WORD or not text.isprintable():
        problem = "is empty" if not text else "has characters that cannot stand in a job script"
        if len(text) > _LONGEST_WORD:
            problem = f"has {len(text):,} characters, and a job script takes {_LONGEST_WORD:,}"
        raise UsageError(f"{what} {_shown(text)}: it {problem}")
    return text


def path_word(path: str) -> str:
    """Return a path that no program takes for an option, or for something on another host.

    Source: GNU tar reads "a:b" as the file b of the host a.
    """
    first = path.partition("/")[0]
    return f"./{path}" if first.startswith("-") or ":" in first else path


def quoted_path(path: str) -> str:
    """Return a path as one word of bash."""
    return shlex.quote(path_word(path))


def _shown(text: str) -> str:
    return ascii(text if len(text) <= _SHOWN else text[:_SHOWN] + "...")
