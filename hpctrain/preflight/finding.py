"""What one check found: a status, the fact, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from hpctrain.errors import ExitCode

Status = Literal["pass", "warn", "fail", "skip"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """The outcome of one check.

    Attributes:
        name: of the check, such as "all-reduce".
        status: "fail" where training would not start, or not end well; "warn" where it works but
            not as it could; "skip" where there is nothing to check, or nothing to check it with.
        fact: what was found, with its place.
        fix: what to do about it; empty where nothing needs to be done.
        values: the numbers behind the fact, for machines; JSON.
    """

    name: str
    status: Status
    fact: str
    fix: str = ""
    values: Mapping[str, Any] = field(default_factory=dict)


def overall(findings: Iterable[Finding]) -> Literal["pass", "warn", "fail"]:
    """Return the worst status there is; what was skipped does not count."""
    found = {finding.status for finding in findings}
    return "fail" if "fail" in found else "warn" if "warn" in found else "pass"


def exit_code(findings: Iterable[Finding]) -> ExitCode:
    """Return what a job script branches on: 0, also with warnings, or 69."""
    return ExitCode.LAUNCH if overall(findings) == "fail" else ExitCode.DONE


def ranges(numbers: Iterable[int]) -> str:
    """Return whole numbers as the kernel writes them: "0-7,64"."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
