"""Machine figures: a thread of one rank a node looks at it now and then, and writes them down.

Nothing waits for it, and it asks no other rank: what ranks know of their steps they note in memory
that their node shares, and rank 0 reads the files of the other hosts to find who is slow.
"""

from __future__ import annotations

import logging
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from hpctrain.observe.machine.counters import Reading, read_counters
from hpctrain.observe.machine.devices import DeviceReading, Devices, find_devices
from hpctrain.observe.machine.log import MOST_RANKS, MachineLog, is_recorded, read_hosts
from hpctrain.observe.machine.stragglers import stragglers
from hpctrain.utils.text import printable

SAMPLE_SECONDS = 5.0

LINE_SECONDS = 60.0

_TAIL_BYTES = 2**14
"""Of each host's file, in which rank 0 looks for who is slow."""

_MB = 1e6

_logger = logging.getLogger("hpctrain")


class RankFigures(NamedTuple):
    """What a rank notes of itself at a step that is logged; all are whole numbers.

    Attributes:
        device: index on its node; -1: a processor.
        step: that the run stands at.
        steps: done in this job.
        elapsed: nanoseconds since its first step.
        data: of these, waiting for data.
        others: of these, waiting for other ranks.
        apart: of these, evaluations and saves.
        allocated: bytes of the device that torch has given out.
        peak: the most so far.
    """

    rank: int
    device: int
    step: int
    steps: int
    elapsed: int
    data: int
    others: int
    apart: int
    allocated: int
    peak: int

    @property
    def is_noted(self) -> bool:
        return self.elapsed > 0


_NOTHING = RankFigures(0, 0, 0, 0, 0, 0, 0, 0, 0, 0)


@contextmanager
def machine_recorded(
    run: Path,
    host: str,
    *,
    node_rank: int,
    num_nodes: int,
    local_rank: int,
    kind: str,
    notes: Callable[[], Sequence[Sequence[int]]],
) -> Iterator[None]:
    """Record the figures of this node while the body runs, on one rank of it.

    Args:
        run: folder of the run.
        host: name of this node.
        node_rank: index of this node.
        num_nodes: of the job.
        local_rank: of this process; 0 records.
        kind: of the devices, such as "cuda".
        notes: returns RankFigures of every rank of this node.
    """
    if local_rank != 0 or not is_recorded(node_rank, num_nodes):
        yield
        return
    recorder = Recorder(
        run, host, num_nodes=num_nodes, kind=kind, notes=notes, names_slow=node_rank == 0
    )
    stop = threading.Event()
    thread = threading.Thread(
        target=recorder.record_until, args=(stop,), name="hpctrain-machine", daemon=True
    )
    started = False
    with suppress(RuntimeError):  # a limit of processes
        thread.start()
        started = True
    try:
        yield
    finally:
        stop.set()
        if started:
            thread.join(SAMPLE_SECONDS)  # not for ever: a file system may hang


class Recorder:
    """Samples in memory, and a line of them at a time."""

    def __init__(
        self,
        run: Path,
        host: str,
        *,
        num_nodes: int,
        kind: str,
        notes: Callable[[], Sequence[Sequence[int]]],
        names_slow: bool,
        root: Path = Path("/"),
    ) -> None:
        """Prepare; nothing is read before `record_until`.

        Args:
            run: folder of the run.
            host: name of this node.
            num_nodes: of the job.
            kind: of the devices, such as "cuda".
            notes: returns RankFigures of every rank of this node.
            names_slow: whether to look for ranks that are slow, and tell them in the log.
            root: of the kernel's file systems.
        """
        self._run = run
        self._host = host
        self._num_nodes = num_nodes
        self._kind = kind
        self._notes = notes
        self._names_slow = names_slow
        self._root = root
        self._devices: Devices | None = None
        self._log: MachineLog | None = None
        self._readings: list[Reading] = []
        self._device_readings: list[Sequence[DeviceReading]] = []
        self._before: dict[int, RankFigures] = {}
        self._named: set[int] = set()

    def record_until(self, stop: threading.Event) -> None:
        """Record until stopped; the body of the thread. An error ends it, not the job."""
        try:
            self._log = MachineLog(self._run, self._host, self._num_nodes)
            self._devices = find_devices(self._kind, self._root)
            self.sample()
            due = time.monotonic() + SAMPLE_SECONDS  # somebody may look already
            while not stop.wait(SAMPLE_SECONDS):
                self.sample()
                if time.monotonic() >= due and self.write():
                    due = time.monotonic() + LINE_SECONDS - SAMPLE_SECONDS / 2
                    self._warn_slow()
            self.sample()
            self.write()
            self._log.close()
        except Exception as error:  # noqa: BLE001 - figures are no reason for a job to fail
            with suppress(Exception):
                _logger.warning("no more machine figures of %s: %s", self._host, error)

    def sample(self) -> None:
        """Look at the node once."""
        assert self._devices is not None
        self._readings.append(read_counters(self._root))
        self._device_readings.append(self._devices.read())
        if len(self._readings) > _MOST_SAMPLES:
            # Lines are far apart where there are many hosts: the first is what rates begin at.
            del self._readings[1]
            del self._device_readings[1]

    def write(self) -> bool:
        """Write a line of what was sampled since the last one; tell whether it may be now."""
        assert self._log is not None
        assert self._devices is not None
        if len(self._readings) < 2:
            return False
        figures = [RankFigures(*numbers) for numbers in self._notes()]
        noted = {each.rank: each for each in figures if each.is_noted}
        line = {
            "kind": "machine",
            "step": max((each.step for each in noted.values()), default=0),
            **node_facts(self._readings),
            **device_facts(self._device_readings),
            **({"power": self._devices.source} if self._devices.source else {}),
            **rank_facts(self._before, noted),
        }
        if not self._log.append(line):
            return False
        self._before = noted
        del self._readings[:-1]
        del self._device_readings[:-1]
        return True

    def _warn_slow(self) -> None:
        """Name ranks that are slow, each once, and again once it was not slow for a while."""
        if not self._names_slow:
            return
        assert self._log is not None
        slow = stragglers(read_hosts(self._run, _TAIL_BYTES))
        for each in slow:
            if each.rank not in self._named:
                clock = time.strftime("%H:%M:%S", time.localtime(each.since))
                _logger.warning("%s", printable(each.line(clock)))
                facts = {name: getattr(each, name) for name in each.__slots__}
                self._log.append({"kind": "straggler", "step": 0, **facts})
        self._named = {each.rank for each in slow}


_MOST_SAMPLES = 720
"""In memory: an hour of them."""


def node_facts(readings: Sequence[Reading]) -> dict[str, Any]:
    """Return what a line says of a node, by the counters between the first and the last reading."""
    first, last = readings[0], readings[-1]
    seconds = max(last.moment - first.moment, 1e-9)

    def rate(before: float | None, after: float | None, unit: float = 1.0) -> float | None:
        if before is None or after is None or after < before:  # a counter was reset
            return None
        return _short((after - before) / seconds / unit)

    def rates(before: tuple[int, int], after: tuple[int, int]) -> list[float | None]:
        return [rate(one, other, _MB) for one, other in zip(before, after, strict=True)]

    busy = rate(first.busy_seconds, last.busy_seconds)
    cpu = {
        "cores": last.cores or None,
        "busy": None if busy is None or not last.cores else _short(busy / last.cores),
        "job": rate(first.job_seconds, last.job_seconds),
        "throttled": rate(first.throttled_seconds, last.throttled_seconds) or None,
    }
    used = [reading.memory_bytes[1] for reading in readings if reading.memory_bytes is not None]
    job = [reading.job_bytes for reading in readings if reading.job_bytes is not None]
    memory = {
        "total": _megabytes(last.memory_bytes[0] if last.memory_bytes else None),
        "used": _megabytes(max(used, default=None)),
        "job": _megabytes(max(job, default=None)),
        "limit": _megabytes(last.job_limit_bytes),
    }
    disk: dict[str, float | None] = {}
    if first.disk_bytes is not None and last.disk_bytes is not None:
        disk = dict(zip(("read", "write"), rates(first.disk_bytes, last.disk_bytes), strict=True))
    network = {
        name: rates(first.network_bytes[name], after)
        for name, after in last.network_bytes.items()
        if name in first.network_bytes
    }
    return {
        "seconds": round(seconds, 1),
        **({"joules": energy} if (energy := _joules(first, last)) else {}),
        **_known(cpu=_known(**cpu), memory=_known(**memory), disk=_known(**disk), network=network),
    }


def _joules(first: Reading, last: Reading) -> dict[str, float]:
    """Return the energy between two readings: of the whole node, or of its processors."""
    used: dict[str, float] = {}
    for name, (after, most) in last.joules.items():
        before = first.joules.get(name, (after, most))[0]
        spent = after - before + (most if after < before else 0.0)
        what = "node" if name == "node" else "cpu"
        if spent >= 0:
            used[what] = used.get(what, 0.0) + spent
    return {what: _short(spent) for what, spent in used.items()}


def device_facts(readings: Sequence[Sequence[DeviceReading]]) -> dict[str, Any]:
    """Return what a line says of the devices of a node: means, and what was worst."""
    samples = [list(each) for each in zip(*readings, strict=False)]  # a list a device
    if not samples:
        return {}
    memories = [[each.memory_bytes for each in device if each.memory_bytes] for device in samples]
    columns = {
        "name": [device[-1].name for device in samples],
        "busy": [_mean([each.busy for each in device]) for device in samples],
        "memory": [_megabytes(max((used for used, _ in each), default=None)) for each in memories],
        "memory_total": [_megabytes(each[-1][1] if each else None) for each in memories],
        "watts": [_mean([each.watts for each in device]) for device in samples],
        "celsius": [_most([each.celsius for each in device]) for device in samples],
        "megahertz": [_mean([each.megahertz for each in device]) for device in samples],
        "throttled": [
            ", ".join(dict.fromkeys(each.throttled for each in device if each.throttled))
            for device in samples
        ],
        "errors": [device[-1].errors for device in samples],
    }
    # A column that says nothing of any device is left out.
    return {
        "devices": {
            name: column
            for name, column in columns.items()
            if any(value is not None and value != "" for value in column)
        }
    }


def rank_facts(before: Mapping[int, RankFigures], now: Mapping[int, RankFigures]) -> dict[str, Any]:
    """Return what a line says of the ranks of a node; nothing where none has done a step since."""
    rows = []
    for rank, after in sorted(now.items()):
        then = before.get(rank, _NOTHING)
        steps = after.steps - then.steps
        if steps <= 0:  # it has not got on
            continue
        apart = after.apart - then.apart
        rows.append(
            {
                "rank": rank,
                "device": after.device,
                "step": _short((after.elapsed - then.elapsed - apart) / steps / 1e9),
                "data": _short((after.data - then.data) / steps / 1e9),
                "others": _short((after.others - then.others) / steps / 1e9),
                "memory": _megabytes(after.allocated),
                "peak": _megabytes(after.peak),
            }
        )
    if not rows:
        return {}
    chosen = _spread(sorted(rows, key=lambda row: row["step"] - row["others"]))
    columns = {name: [row[name] for row in chosen] for name in rows[0]}
    if not any(columns["peak"]):  # on a processor torch counts no memory
        del columns["memory"], columns["peak"]
    return {"ranks": {"count": len(rows), **columns}}


def _spread(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return rows by rank: all, or MOST_RANKS at equal distances with the first and the last."""
    if len(rows) > MOST_RANKS:
        last = len(rows) - 1
        rows = [rows[round(place * last / (MOST_RANKS - 1))] for place in range(MOST_RANKS)]
    return sorted(rows, key=lambda row: row["rank"])


def _known(**facts: Any) -> dict[str, Any]:
    return {name: value for name, value in facts.items() if value is not None and value != {}}


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return _short(statistics.fmean(known)) if known else None


def _most(values: Sequence[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)


def _megabytes(num_bytes: float | None) -> int | None:
    return None if num_bytes is None else round(num_bytes / _MB)


def _short(value: float) -> float:
    """Return a number of four digits: a line is to stay small."""
    return float(f"{value:.4g}")
