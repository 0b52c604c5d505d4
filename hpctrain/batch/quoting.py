"""What may stand in a job script: plain values in directives, words that bash takes as they are.

A scheduler reads its directives line by line and splits them at spaces; bash reads all the rest. So
a value with a line feed is refused wherever it would stand, be it in a comment; a directive takes
plain characters only; and what bash sees is quoted.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess

from hpctrain.errors import UsageError

_LONGEST_VALUE = 255
"""Characters of an account, a queue or a job's name; schedulers take fewer."""
_LONGEST_WORD = 4096
"""Characters of a path, by Linux, and of whatever else a script names."""

_PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.,:@/+=-]*", re.ASCII)
_CONSTRAINT = re.compile(r"[A-Za-z0-9_\[(!][A-Za-z0-9_.,:@/+=\[\]()&|!<>*-]*", re.ASCII)
_MEMORY = re.compile(r"[1-9][0-9]{0,8}[KMGT]", re.ASCII)
_DIRECTIVE = re.compile(r"-[\x20-\x7e]+", re.ASCII)
_WORDS = re.compile(r"[A-Za-z0-9_./:=@%+,-]+( [A-Za-z0-9_./:=@%+,-]+)*", re.ASCII)
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)
_OURS = re.compile(
    r"(HPCTRAIN_(TOKEN|ATTEMPT|CHECK|POINT|MAX_JOBS|(MAX_)?NODE_HOURS)|SLURM_|PBS_|LSB_|FLUX_|BASH).*"
)
"""Variables that scripts or schedulers set themselves, and those that are bash's own."""
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


def constraint_value(text: str, what: str) -> str:
    """Return what nodes have to have: a plain value, with the signs of "and", "or" and sets.

    Raises:
        UsageError: if it is not one word of these.
    """
    if len(text) > _LONGEST_VALUE or not _CONSTRAINT.fullmatch(text):
        raise UsageError(
            f"{what} {_shown(text)}: expected one word of letters, digits and "
            '_ . , : @ / + = - & | ! < > * [ ] ( ), such as "gpu&hbm80g"'
        )
    return text


def memory_value(text: str, what: str) -> str:
    """Return a size of memory.

    Raises:
        UsageError: if it is none.
    """
    if not _MEMORY.fullmatch(text):
        raise UsageError(f'{what} {_shown(text)}: expected a whole number and K, M, G or T: "64G"')
    return text


def directive(text: str, what: str) -> str:
    """Return a line for the scheduler, without its prefix.

    Raises:
        UsageError: if it is not one option in characters of ASCII, its quotes closed.
    """
    problem = ""
    if not _DIRECTIVE.fullmatch(text) or len(text) > _LONGEST_VALUE:
        problem = f"expected an option of one line of ASCII, at most {_LONGEST_VALUE} characters"
    elif any(sign in text for sign in "#`$\\"):
        problem = "it has a sign that schedulers take for something else: # ` $ or \\"
    else:
        try:
            shlex.split(text)
        except ValueError as error:
            problem = str(error)[:1].lower() + str(error)[1:]
    if problem:
        raise UsageError(f"{what} {_shown(text)}: {problem}")
    return text


def setup_line(text: str, what: str) -> str:
    """Return a line of bash as it may stand in a script: whole in itself, whatever it holds.

    Raises:
        UsageError: if it is not one line, or no bash.
    """
    require_line(text, what)
    bash = shutil.which("bash")
    if bash is not None:
        checked = subprocess.run(
            [bash, "--norc", "-n", "-c", text], capture_output=True, text=True, check=False
        )
        # What bash only warns of, such as a here-document without an end, is no line either.
        if checked.returncode or checked.stderr:
            said = checked.stderr.strip().splitlines()[:1]
            raise UsageError(f"{what} {_shown(text)}: not a line of bash: {''.join(said)!a}")
    return text if _WORDS.fullmatch(text) else f"eval {shlex.quote(text)}"


def variable(name: str, value: str, what: str) -> str:
    """Return NAME=VALUE as a word of bash that sets a variable.

    Raises:
        UsageError: if the name is none, or one that is not for users to set.
    """
    if not _NAME.fullmatch(name) or _OURS.fullmatch(name):
        ours = "the script or the scheduler sets it" if _OURS.fullmatch(name) else "no such name"
        raise UsageError(f"{what} {_shown(name)}: {ours}")
    if value:
        require_line(value, f"{what} {name}")
    return f"{name}={shlex.quote(value)}"


def bind(text: str, what: str) -> tuple[str, str]:
    """Return the two ends of a folder that an image sees, "OUTSIDE" or "OUTSIDE:INSIDE".

    Raises:
        UsageError: if they are not absolute paths, without signs that container runtimes split at.
    """
    require_line(text, what)
    outside, _, inside = text.partition(":")
    ends = (outside, inside or outside)
    for end in ends:
        if not end.startswith("/") or any(sign in end for sign in ",:;+"):
            raise UsageError(
                f"{what} {_shown(text)}: expected /outside or /outside:/inside, absolute paths "
                "without , : ; and +"
            )
    return ends


def path_word(path: str) -> str:
    """Return a path that no program takes for an option, or for something on another host.

    Source: GNU tar reads "a:b" as the file b of the host a.
    """
    first = path.partition("/")[0]
    return f"./{path}" if first.startswith("-") or ":" in first else path


def bash_problem(script: str) -> str | None:
    """Return what bash finds wrong in a script before it runs, None: nothing, or no bash here."""
    bash = shutil.which("bash")
    if bash is None:
        return None
    checked = subprocess.run(
        [bash, "-n"], input=script, capture_output=True, text=True, check=False
    )
    return checked.stderr.strip() or None


def quoted_path(path: str) -> str:
    """Return a path as one word of bash."""
    return shlex.quote(path_word(path))


def _shown(text: str) -> str:
    return ascii(text if len(text) <= _SHOWN else text[:_SHOWN] + "...")
