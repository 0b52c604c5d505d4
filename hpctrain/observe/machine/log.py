"""machine/<host>.jsonl: what each node of a run was doing, a line every minute or less often.

A line has kind "machine", "step" and "wall_time" as the lines of metrics.jsonl, "seconds" that it
is about, and what was known of these; means, where it is not said otherwise:

    cpu      "cores"; "busy", a share of them; "job", as many cores as the job had; "throttled", a
             share of the time
    memory   MB: "total" and "used" of the node, "job" and its "limit"
    disk     MB/s: "read", "write"
    network  MB/s by interface: [received, sent]
    joules   "node" by a Cray's counter, else "cpu" by RAPL; of GPUs it is "watts" times "seconds"
    power    what measures the watts of the devices: "NVML", ...
    devices  a list each, an item a device: "name", "busy", "memory" and "memory_total" in MB,
             "watts", "celsius" (highest), "megahertz", "throttled" (why), "errors"
    ranks    a list each, an item a rank: "rank", "device", "step" in seconds, and of these "data"
             and "others", waiting for each; "memory" and "peak" of torch in MB. Of more than
             MOST_RANKS a node those between the fastest and the slowest at equal distances;
             "count" says of how many

A line of kind "straggler" names a rank that is slower than the others, see
`hpctrain.observe.machine.stragglers`.
"""

from __future__ import annotations

import os
import re
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any

from hpctrain.observe.records import WALL_TIME, from_line, lines_of, to_line
from hpctrain.utils import text
from hpctrain.utils.files import AppendedFile, names_in, open_file
from hpctrain.utils.permissions import follow_folder

FOLDER = "machine"

_JOULES_PER_KWH = 3.6e6

WEEK_BYTES = 50_000_000
"""What all hosts of a run write in a week, at most."""

MOST_HOSTS = 256
"""That write; of more, every second one does, or every third."""

MOST_RANKS = 16
"""Of a node that have numbers of their own in a line."""

TOTAL_BYTES = 2**26
"""That are read of all hosts together: more than a week's, and some seconds of work.

Of a longer run the newest are, and energy says which part of the node-hours it covers.
"""

_WEEK_SECONDS = 7 * 86_400.0

_LIFE_BYTES = 2**28
"""That are searched for moments alone."""

_BURST, _STEADY = 0.1, 0.7
"""Shares of a week's bytes: at once, and evenly. The rest is for jobs on ever other hosts."""

_MOMENT = re.compile(rb'"wall_time": (\d+(?:\.\d+)?)')


def is_recorded(node_rank: int, num_nodes: int) -> bool:
    """Tell whether a node writes its figures: the first one does, and MOST_HOSTS at most."""
    return node_rank % -(-num_nodes // MOST_HOSTS) == 0


def file_of(run: Path, host: str) -> Path:
    """Return the file of a host."""
    return run / FOLDER / (re.sub(r"[^\w.-]", "-", host, flags=re.ASCII)[:200] + ".jsonl")


class Allowance:
    """How many bytes a host may write: some at once, further ones as time goes by.

    So no week has more than its part, however long it was silent before.
    """

    def __init__(
        self, num_hosts: int, silent_seconds: float | None, clock: Callable[[], float]
    ) -> None:
        """Begin.

        Args:
            num_hosts: that write.
            silent_seconds: since the last line of an earlier job; None: there was none.
            clock: seconds, monotonic.
        """
        self._rate = _STEADY * WEEK_BYTES / num_hosts / _WEEK_SECONDS
        self._most = _BURST * WEEK_BYTES / num_hosts
        self._clock = clock
        self._moment = clock()
        # What an earlier job has left is not known; it was not less than nothing.
        left = self._most if silent_seconds is None else max(0.0, silent_seconds) * self._rate
        self._left = min(self._most, left)

    def take(self, num_bytes: int) -> bool:
        """Tell whether so many bytes may be written now, and count them if they may."""
        now = self._clock()
        self._left = min(self._most, self._left + (now - self._moment) * self._rate)
        self._moment = now
        if num_bytes > self._left:
            return False
        self._left -= num_bytes
        return True


class MachineLog:
    """Appends lines to the file of this host, as far as its allowance goes.

    Raises:
        OSError: if the file cannot be opened, as where the run folder is not on this node.
    """

    def __init__(
        self,
        run: Path,
        host: str,
        num_nodes: int,
        *,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._now = now
        path = file_of(run, host)
        with suppress(FileExistsError):
            path.parent.mkdir()
            follow_folder(path.parent)
        # Jobs before may have been on other hosts.
        others = sum(other.suffix == ".jsonl" for other in path.parent.iterdir())
        hosts = max(others, min(num_nodes, MOST_HOSTS))
        silent = None
        with suppress(FileNotFoundError):
            silent = now() - path.stat().st_mtime
        self._allowance = Allowance(hosts, silent, clock)
        self._file = AppendedFile(path)

    def append(self, line: Mapping[str, Any]) -> bool:
        """Append a line, and tell whether there was an allowance for it.

        Raises:
            OSError: if it cannot be written.
        """
        content = to_line({**line, WALL_TIME: round(self._now(), 3)})
        if not self._allowance.take(len(content)):
            return False
        self._file.append(content)
        return True

    def close(self) -> None:
        """Close the file.

        Raises:
            OSError: if it may not have got to the disk.
        """
        self._file.close()


def read_hosts(
    run: Path, most_bytes: int | None = None, *, total_bytes: int = TOTAL_BYTES
) -> dict[str, list[dict[str, Any]]]:
    """Return the lines of every host that can be read, by host; none where there are no figures.

    Args:
        run: its folder.
        most_bytes: of the end of each file; None: all of it.
        total_bytes: of the ends of all files together.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for host, line in lines_of_hosts(run, most_bytes, total_bytes=total_bytes):
        if (record := from_line(line)) is not None:
            found.setdefault(host, []).append(record)
    return found


def lines_of_hosts(
    run: Path, most_bytes: int | None = None, *, total_bytes: int = TOTAL_BYTES
) -> Iterator[tuple[str, bytes]]:
    """Yield the lines of every host, each with its host, see `read_hosts`; not yet parsed."""
    names = [name for name in names_in(run / FOLDER) if name.endswith(".jsonl")]
    sizes: dict[str, int] = {}
    for name in names:
        with suppress(OSError):
            sizes[name] = (run / FOLDER / name).stat().st_size
    left = total_bytes
    # The small ones first: what they do not need is for the others.
    for i, name in enumerate(sorted(sizes, key=sizes.__getitem__)):
        share = min(left // (len(sizes) - i), most_bytes or left)
        with suppress(OSError), open_file(run / FOLDER / name) as file:
            start = max(0, os.fstat(file.fileno()).st_size - share)
            file.seek(start)
            for line in lines_of(file):
                if file.tell() - start > share:  # it has grown meanwhile
                    break
                yield name.removesuffix(".jsonl"), line
            left -= min(share, file.tell() - start)


@dataclass(frozen=True, slots=True)
class Energy:
    """Energy that was measured in some time.

    Attributes:
        joules: of all that was measured.
        node_seconds: for which it was.
        parts: what was measured: "nodes", "GPUs", "processors".
        sources: what has measured it.
    """

    joules: float
    node_seconds: float
    parts: tuple[str, ...]
    sources: tuple[str, ...]

    def to_json(self, node_seconds: float | None) -> dict[str, Any]:
        """Return it by name; "coverage" is a share of the node-seconds that were used."""
        coverage = (
            None if not node_seconds else round(min(1.0, self.node_seconds / node_seconds), 4)
        )
        return {
            "kwh": self.joules / _JOULES_PER_KWH,
            "scope": list(self.parts),
            "source": list(self.sources),
            "coverage": coverage,
        }


def energy_line(energy: Mapping[str, Any] | None) -> str:
    """Return energy in words, by its JSON; None is none that was measured."""
    if energy is None:
        return "not measured"
    coverage = energy["coverage"]
    covered = "" if coverage is None else f", {text.percent(coverage, 1.0)} of the node-hours"
    return (
        f"{text.number(energy['kwh'])} kWh of {' and '.join(energy['scope'])} "
        f"({', '.join(energy['source'])}{covered})"
    )


class EnergySum:
    """Energy, added up line by line."""

    def __init__(self) -> None:
        self._joules = self._covered = 0.0
        self._parts: dict[str, None] = {}
        self._sources: dict[str, None] = {}

    def add(self, line: Mapping[str, Any]) -> None:
        """Add what a line of machine figures says."""
        seconds = _positive(line.get("seconds"))
        if line["kind"] != "machine" or not seconds:
            return
        found = _of_line(line, seconds)
        self._joules += sum(amount for _, _, amount in found)
        self._covered += seconds if found else 0.0
        self._parts |= dict.fromkeys(part for part, _, _ in found)
        self._sources |= dict.fromkeys(source for _, source, _ in found)

    def energy(self) -> Energy | None:
        """Return all of it; None where no line has any."""
        if not self._parts:
            return None
        return Energy(self._joules, self._covered, tuple(self._parts), tuple(self._sources))


def energy_between(run: Path, bounds: Sequence[float]) -> list[Energy | None]:
    """Return the energy of a run and of stretches of its time, each line read once.

    Args:
        run: its folder.
        bounds: seconds since 1970 at which the stretches begin, rising.

    Returns:
        Of the whole run, then of each stretch; None where no line has any.
    """
    sums = [EnergySum() for _ in range(len(bounds) + 1)]
    for _, line in lines_of_hosts(run):
        if (record := from_line(line)) is None:
            continue
        sums[0].add(record)
        if place := bisect_right(bounds, _positive(record.get(WALL_TIME))):
            sums[place].add(record)
    return [each.energy() for each in sums]


def energy_since(run: Path, moment: float) -> Energy | None:
    """Return the energy of what is measured since a moment, in seconds since 1970."""
    return energy_between(run, [moment])[1]


def _of_line(line: Mapping[str, Any], seconds: float) -> list[tuple[str, str, float]]:
    """Return what was measured, its source and its joules; of a whole node nothing else counts."""
    counted = line.get("joules")
    counted = counted if isinstance(counted, Mapping) else {}
    if node := _positive(counted.get("node")):
        return [("nodes", "Cray pm_counters", node)]
    found = []
    devices = line.get("devices")
    watts = devices.get("watts") if isinstance(devices, Mapping) else None
    known = [_positive(each) for each in watts] if isinstance(watts, list) else []
    if any(known):
        found.append(("GPUs", str(line.get("power", "NVML")), sum(known) * seconds))
    if cpu := _positive(counted.get("cpu")):
        found.append(("processors", "RAPL", cpu))
    return found


def _positive(value: object) -> float:
    """Return a number above 0; 0 for what is none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return 0.0
    return float(value) if 0 < value < inf else 0.0


def signs_of_life(run: Path) -> list[float]:
    """Return the moments at which any host has written a line, without looking into the lines."""
    lines = lines_of_hosts(run, total_bytes=_LIFE_BYTES)
    return [float(moment) for _, line in lines for moment in _MOMENT.findall(line)]
