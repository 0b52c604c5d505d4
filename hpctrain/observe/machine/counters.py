"""What a node and a job's part of it have used so far, as the kernel counts it.

Counters only grow; what is used a second is the difference of two readings. All are read from files
below a root, none by a program, and what is not there is left out.

Source: man 5 proc; Documentation/ABI/stable/sysfs-class-infiniband of the Linux kernel (port data
are counted in words of four bytes); the driver of Cassini for telemetry of Slingshot;
Documentation/power/powercap/powercap.rst; HPE's pm_counters of Cray EX, by their documentation.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from hpctrain.utils.proc import cgroup_folders

_SECTOR_BYTES = 512
_WORD_BYTES = 4
_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")

_IDLE = (3, 4)
"""Positions of idle and iowait among the times of a line of /proc/stat."""

_RAPL = re.compile(r"intel-rapl:\d+(:\d+)?")
"""Zones of AMD's processors too; intel-rapl-mmio shows the same ones again."""

_JOB_GROUP = re.compile(r"(slurm[-_.])?job[-_.]\d.*|\d+(\[\d*\])?\.[\w.-]+")
"""Group of a whole job: Slurm's job_12, LSF's job.12.34, PBS's 12.server, above those of ranks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """The counters of a node at one moment; None and empty: unknown.

    Attributes:
        moment: seconds of a monotonic clock.
        cores: of the node.
        busy_seconds: of all cores together.
        job_seconds: of processor time of the job's group.
        throttled_seconds: for which the job was denied a processor by its quota.
        memory_bytes: of the node, and those in use.
        job_bytes: of the job's group, without what the kernel would give up.
        job_limit_bytes: at which the job's group is stopped.
        disk_bytes: read and written.
        network_bytes: received and sent, by interface.
        joules: used, by counter, and the number at which it begins again, 0: never. "node" is that
            of a whole Cray node, others are of RAPL: processor packages and their memory.
    """

    moment: float
    cores: int = 0
    busy_seconds: float | None = None
    job_seconds: float | None = None
    throttled_seconds: float | None = None
    memory_bytes: tuple[int, int] | None = None
    job_bytes: int | None = None
    job_limit_bytes: int | None = None
    disk_bytes: tuple[int, int] | None = None
    network_bytes: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    joules: Mapping[str, tuple[float, float]] = field(default_factory=dict)


def read_counters(root: Path = Path("/")) -> Reading:
    """Return the counters of this node now.

    Args:
        root: of the file systems of the kernel, /proc and /sys.
    """
    cores, busy = _processors(root / "proc/stat")
    job_seconds, throttled = _job_processors(root / "proc")
    job_bytes, limit = _job_memory(root / "proc")
    return Reading(
        moment=time.monotonic(),
        cores=cores,
        busy_seconds=busy,
        job_seconds=job_seconds,
        throttled_seconds=throttled,
        memory_bytes=_memory(root / "proc/meminfo"),
        job_bytes=job_bytes,
        job_limit_bytes=limit,
        disk_bytes=_disks(root),
        network_bytes=dict(sorted(_networks(root / "sys/class"))),
        joules=dict(_energies(root / "sys")),
    )


def job_group(controller: str, proc: Path) -> Path | None:
    """Return the folder of the group of the whole job, else the one of this process.

    Schedulers put a job into a group, and each of its ranks into one below that.
    """
    folders = cgroup_folders(controller, proc)
    for folder in reversed(folders):
        if _JOB_GROUP.fullmatch(folder.name):
            return folder
    return folders[0] if folders else None


def _processors(path: Path) -> tuple[int, float | None]:
    lines = _read(path).splitlines()
    cores = sum(bool(re.match(r"cpu\d", line)) for line in lines)
    if not lines or not lines[0].startswith("cpu "):
        return cores, None
    ticks = [int(word) for word in lines[0].split()[1:9] if word.isdecimal()]
    busy = sum(value for place, value in enumerate(ticks) if place not in _IDLE)
    return cores, busy / _TICKS_PER_SECOND


def _job_processors(proc: Path) -> tuple[float | None, float | None]:
    """Return the seconds that the job's group has had, and those that it was held up."""
    if (folder := job_group("", proc)) is not None:
        table = _table(folder / "cpu.stat")
        if "usage_usec" in table:
            throttled = table.get("throttled_usec")
            return table["usage_usec"] / 1e6, None if throttled is None else throttled / 1e6
    used = throttled_seconds = None
    if (folder := job_group("cpuacct", proc)) is not None:
        nanoseconds = _number(folder / "cpuacct.usage")
        used = None if nanoseconds is None else nanoseconds / 1e9
    if (folder := job_group("cpu", proc)) is not None:
        held = _table(folder / "cpu.stat").get("throttled_time")
        throttled_seconds = None if held is None else held / 1e9
    return used, throttled_seconds


def _memory(path: Path) -> tuple[int, int] | None:
    found = dict(re.findall(r"^(MemTotal|MemAvailable):\s+(\d+) kB$", _read(path), re.MULTILINE))
    if len(found) < 2:
        return None
    total, available = int(found["MemTotal"]) * 1024, int(found["MemAvailable"]) * 1024
    return total, max(0, total - available)


def _job_memory(proc: Path) -> tuple[int | None, int | None]:
    """Return the bytes that the job's group has, and its limit."""
    for controller, used, limit, cache in (
        ("", "memory.current", "memory.max", "inactive_file"),
        ("memory", "memory.usage_in_bytes", "memory.limit_in_bytes", "total_inactive_file"),
    ):
        folder = job_group(controller, proc)
        taken = None if folder is None else _number(folder / used)
        if folder is not None and taken is not None:
            limits = _number(folder / limit)
            # Version 1 says "no limit" by the largest number of whole pages.
            known = limits if limits is not None and limits < 2**60 else None
            return max(0, taken - _table(folder / "memory.stat").get(cache, 0)), known
    return None, None


def _disks(root: Path) -> tuple[int, int] | None:
    """Return the bytes of all disks that are devices: others stand on these, or in memory."""
    read = written = 0
    found = False
    for line in _read(root / "proc/diskstats").splitlines():
        words = line.split()
        if len(words) < 10 or not (root / "sys/block" / words[2] / "device").exists():
            continue
        found = True
        read += int(words[5]) * _SECTOR_BYTES
        written += int(words[9]) * _SECTOR_BYTES
    return (read, written) if found else None


def _networks(classes: Path) -> Iterator[tuple[str, tuple[int, int]]]:
    """Yield the bytes received and sent by interface.

    Of network interfaces those that are devices count: bonds and bridges stand on them. What goes
    past the kernel, over InfiniBand and Slingshot, only the adapters themselves count.
    """
    for folder in _folders(classes / "net"):
        if (folder / "device").exists():
            statistics = folder / "statistics"
            yield from _pair(folder.name, statistics / "rx_bytes", statistics / "tx_bytes")
    for adapter in _folders(classes / "infiniband"):
        for port in _folders(adapter / "ports"):
            counters = port / "counters"
            received, sent = counters / "port_rcv_data", counters / "port_xmit_data"
            yield from _pair(f"{adapter.name}/{port.name}", received, sent, _WORD_BYTES)
    for adapter in _folders(classes / "cxi"):
        telemetry = adapter / "device/telemetry"
        received, sent = telemetry / "hni_sts_rx_ok_octets", telemetry / "hni_sts_tx_ok_octets"
        yield from _pair(adapter.name, received, sent)


def _pair(
    name: str, received: Path, sent: Path, unit: int = 1
) -> Iterator[tuple[str, tuple[int, int]]]:
    into, out = _number(received), _number(sent)
    if into is not None and out is not None:
        yield name, (into * unit, out * unit)


def _energies(sys: Path) -> Iterator[tuple[str, tuple[float, float]]]:
    """Yield counters of energy in joules, and where each begins again.

    A Cray's counts the whole node. Of RAPL packages count, and the memory beside them; cores are
    part of their package, and only root reads any of them on most systems.
    """
    whole = re.match(r"(\d+) J", _read(sys / "cray/pm_counters/energy"))
    if whole is not None:
        yield "node", (float(whole[1]), 0.0)
        return
    for zone in _folders(sys / "class/powercap"):
        name = _read(zone / "name") if _RAPL.fullmatch(zone.name) else ""
        if name != "dram" and not name.startswith("package"):
            continue
        used, most = _number(zone / "energy_uj"), _number(zone / "max_energy_range_uj")
        if used is not None:
            yield zone.name, (used / 1e6, (most or 0) / 1e6)


def _folders(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def _number(path: Path) -> int | None:
    """Return the number in a file; Slingshot's is followed by "@" and when it was taken."""
    word = _read(path).partition("@")[0].strip()
    return int(word) if word.isdecimal() else None


def _table(path: Path) -> dict[str, int]:
    words = [line.split() for line in _read(path).splitlines()]
    return {line[0]: int(line[1]) for line in words if len(line) == 2 and line[1].isdecimal()}


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:  # also what a driver answers for a counter that it lacks
        return ""
