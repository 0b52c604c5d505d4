"""What checks find, and how it is reported: a line a finding, a table of the ranks, or JSON."""

from __future__ import annotations

import json
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from hpctrain.errors import ExitCode, HpctrainError
from hpctrain.topology import Topology
from hpctrain.utils import text
from hpctrain.version import __version__

if TYPE_CHECKING:  # loads torch, which a job that has failed to start can do without
    from hpctrain.preflight.rank_facts import RankFacts

Status = Literal["pass", "warn", "fail", "skip"]

COLUMNS = 100
_MOST_ROWS = 32
_WIDEST_CELL = 24
_NAME_COLUMNS = 20
_WORDS: dict[Status, str] = {
    "fail": "failed",
    "warn": "to look at",
    "pass": "passed",
    "skip": "skipped",
}
_HEADS = ("rank", "host", "local", "device", "UUID", "cores", "NUMA", "interface")


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
    return ",".join(text.ranges(sorted(numbers), to="-"))


def world_table(ranks: Sequence[RankFacts]) -> str:
    """Return the table of the ranks; of many ranks the first, the rest is in the JSON."""
    rows = [_HEADS, *(_row(rank) for rank in ranks[:_MOST_ROWS])]
    used = [i for i in range(len(_HEADS)) if any(row[i] for row in rows[1:])]
    widths = {i: max(len(row[i]) for row in rows) for i in used}
    lines = ["  ".join(f"{row[i]:<{widths[i]}}" for i in used).rstrip() for row in rows]
    if len(ranks) > _MOST_ROWS:
        lines.append(f"and {len(ranks) - _MOST_ROWS:,} more ranks; --json has all of them")
    return "\n".join(line[:COLUMNS] for line in lines)


def finding_text(finding: Finding) -> str:
    """Return a finding in lines of at most 100 columns, as far as its words are not longer."""
    begin = f"{finding.status:<6}{finding.name:<{_NAME_COLUMNS}}"
    lines = _wrapped(begin, finding.fact)
    if finding.fix:
        lines += _wrapped(" " * len(begin) + "fix: ", finding.fix)
    return "\n".join(lines)


def verdict(findings: Sequence[Finding]) -> str:
    """Return the last line."""
    counts = Counter(finding.status for finding in findings)
    counted = ", ".join(f"{counts[key]} {word}" for key, word in _WORDS.items() if counts[key])
    ending = {"fail": "not ready", "warn": "ready", "pass": "ready"}[overall(findings)]
    return f"{ending}: {counted}"


def to_json(
    config: str,
    topology: Topology | None,
    backend: str | None,
    ranks: Sequence[RankFacts],
    findings: Sequence[Finding],
    code: int | None = None,
) -> str:
    """Return the whole report as one JSON object.

    Args:
        config: the file.
        topology: None where there is no world.
        backend: of the process group.
        ranks: of the table.
        findings: in the order in which they were made.
        code: the exit code where it is not that of the findings.
    """
    world = topology and {
        "world_size": topology.world_size,
        "num_nodes": topology.num_nodes,
        "hosts": list(topology.hosts),
        "launcher": topology.launcher,
        "mpi": topology.mpi,
        "backend": backend,
    }
    document = {
        "hpctrain": __version__,
        "config": config,
        "status": overall(findings),
        "exit_code": int(exit_code(findings) if code is None else code),
        "world": world,
        "ranks": [_rank_json(rank) for rank in ranks],
        "findings": [
            {
                "name": finding.name,
                "status": finding.status,
                "fact": finding.fact,
                "fix": finding.fix,
                "values": dict(finding.values),
            }
            for finding in findings
        ],
    }
    return json.dumps(document)


def start_failed_json(config: str, error: HpctrainError) -> str:
    """Return the report of a preflight that could not even begin."""
    finding = Finding(name="start", status="fail", fact=str(error))
    return to_json(config, None, None, [], [finding], error.exit_code)


def _row(rank: RankFacts) -> tuple[str, ...]:
    cells = (
        str(rank.rank),
        rank.host,
        str(rank.local_rank),
        rank.device,
        rank.device_uuid.removeprefix("GPU-")[:8],
        ranges(rank.cores),
        ranges(rank.numa_nodes),
        rank.interface,
    )
    return tuple(
        cell if len(cell) <= _WIDEST_CELL else f"{cell[: _WIDEST_CELL - 3]}..." for cell in cells
    )


def _rank_json(rank: RankFacts) -> dict[str, Any]:
    return {
        "rank": rank.rank,
        "host": rank.host,
        "node_rank": rank.node_rank,
        "local_rank": rank.local_rank,
        "device": rank.device,
        "device_name": rank.device_name,
        "device_uuid": rank.device_uuid,
        "cores": list(rank.cores),
        "numa_nodes": list(rank.numa_nodes),
        "threads": rank.threads,
        "interface": rank.interface,
    }


def _wrapped(begin: str, message: str) -> list[str]:
    lines: list[str] = []
    for paragraph in message.splitlines():
        lines += textwrap.wrap(
            paragraph,
            COLUMNS,
            initial_indent=" " * len(begin) if lines else begin,
            subsequent_indent=" " * len(begin),
            # Paths and commands are to be copied.
            break_long_words=False,
            break_on_hyphens=False,
        )
    return lines
