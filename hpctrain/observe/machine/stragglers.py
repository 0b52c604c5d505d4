"""Ranks that make others wait: slower than most of them for some time. By machine figures alone."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hpctrain.observe.records import WALL_TIME
from hpctrain.utils import text

SLOWER = 1.2
"""Times the time of the rank in the middle: nothing below that is worth a word."""

LEAST_LINES = 3
"""In a row: a hiccup is none of it."""

_Lines = Mapping[str, Sequence[Mapping[str, Any]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Straggler:
    """A rank whose own part of a step takes longer than that of the others.

    Attributes:
        device: its index on its node; -1: a processor.
        seconds: of its steps, less those in which it waits for others.
        usual_seconds: the same of the rank in the middle.
        since: seconds since 1970.
        why: what is known of the cause, in words; empty: nothing.
    """

    rank: int
    host: str
    device: int
    seconds: float
    usual_seconds: float
    since: float
    why: str = ""

    def line(self, clock: str) -> str:
        """Return a line for the log, with the time since which it is so."""
        device = "" if self.device < 0 else f", device {self.device}"
        share = text.percent(self.seconds - self.usual_seconds, self.usual_seconds)
        return (
            f"rank {self.rank} on {self.host}{device} is {share} slower than the others since "
            f"{clock}: {text.metric(self.seconds)} s of a step are its own, "
            f"{text.metric(self.usual_seconds)} s of the rank in the middle"
            + (f"; {self.why}" if self.why else "")
        )


def stragglers(hosts: _Lines) -> list[Straggler]:
    """Return the ranks that are slower than most in the newest lines of all hosts.

    Args:
        hosts: lines of kind "machine" by host, in their order.
    """
    machine = {
        host: [line for line in lines if line["kind"] == "machine" and _own(line)]
        for host, lines in hosts.items()
    }
    length = max(map(len, machine.values()), default=0)
    # Hosts begin together and write as often: the last lines of all are about the same minutes.
    windows = [
        {host: lines[-back] for host, lines in machine.items() if len(lines) >= back}
        for back in range(1, length + 1)
    ]
    usual = [
        statistics.median_low([value for line in window.values() for value in _own(line).values()])
        for window in windows
    ]
    found = []
    for host, lines in machine.items():
        for rank, seconds in _own(lines[-1]).items() if lines else ():
            slow_lines = 0
            for line, middle in zip(reversed(lines), usual, strict=False):
                if not _own(line).get(rank, 0.0) > SLOWER * middle:
                    break
                slow_lines += 1
            if slow_lines >= LEAST_LINES:
                found.append(
                    Straggler(
                        rank=rank,
                        host=host,
                        device=_of_rank(lines[-1], rank, "device", -1),
                        seconds=seconds,
                        usual_seconds=usual[0],
                        since=_began(lines[-slow_lines]),
                        why=_why(lines[-1], rank, seconds - usual[0]),
                    )
                )
    return sorted(found, key=lambda straggler: -straggler.seconds)


def _own(line: Mapping[str, Any]) -> dict[int, float]:
    """Return the seconds of a step that are each rank's own, by rank."""
    ranks = line.get("ranks")
    if not isinstance(ranks, Mapping):
        return {}
    columns = [ranks.get(name) for name in ("rank", "step", "others")]
    if not all(isinstance(column, list) for column in columns):
        return {}
    return {
        rank: step - others
        for rank, step, others in zip(*columns, strict=False)
        if _is_number(rank) and _is_number(step) and _is_number(others)
    }


def _of_rank(line: Mapping[str, Any], rank: int, name: str, missing: Any) -> Any:
    """Return what a line says of a rank."""
    ranks = line["ranks"]
    column, place = ranks.get(name), ranks["rank"].index(rank)
    return column[place] if isinstance(column, list) and place < len(column) else missing


def _why(line: Mapping[str, Any], rank: int, excess: float) -> str:
    data = _of_rank(line, rank, "data", 0.0)
    if _is_number(data) and data > 0.5 * excess:
        return "it waits for its data"
    device = _of_rank(line, rank, "device", -1)
    throttled = (line.get("devices") or {}).get("throttled")
    if isinstance(throttled, list) and isinstance(device, int) and 0 <= device < len(throttled):
        return f"its device is throttled: {throttled[device]}" if throttled[device] else ""
    return ""


def _began(line: Mapping[str, Any]) -> float:
    moment, seconds = line.get(WALL_TIME), line.get("seconds")
    return float(moment or 0.0) - float(seconds or 0.0)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
