"""Runs in a terminal: where they stand, their curves, machines and log, drawn anew every moment.

Written to a pipe it is drawn once. Everything is read from files, as the page does it; text from
files is shown as text.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TextIO

from hpctrain.observe.machine.log import FOLDER as MACHINE
from hpctrain.observe.metrics import JSONL_FILE
from hpctrain.observe.records import WALL_TIME, flat, from_line
from hpctrain.utils import text
from hpctrain.watch.run_files import LOG, GrowingFile, RunFiles

EVERY_SECONDS = 2.0

LEAST_COLUMNS = 40

_FIRST_BYTES = 32 * 2**20
"""Of the end of metrics.jsonl, which curves begin with."""

_TAIL_BYTES = 2**15
"""Of a log and of a host's figures."""
_HOSTS_BYTES = 2**21
"""Of the figures of all hosts together."""

_MOST_POINTS = 2000
_MOST_SERIES = 2000
"""That are kept; a terminal shows some dozens of them."""
_PIPE_COLUMNS, _LOG_LINES = 100, 10
"""Where nothing says how much room there is."""

_OF_THE_LINE = ("step", "epoch", "samples_seen", "skipped_steps", WALL_TIME)

_BLOCKS = "▁▂▃▄▅▆▇█"
_LETTERS = "_.-~=+*#"

_STATE_COLOURS = {"running": "32", "complete": "32", "failed": "31", "unknown": "31"}


def show(
    runs: Sequence[RunFiles],
    stream: TextIO,
    *,
    sleep: Callable[[float], None] = time.sleep,
    frames: int | None = None,
) -> None:
    """Draw runs until the user ends it; once where nobody sees it change.

    Args:
        runs: that are shown.
        stream: a terminal, a pipe or a file.
        sleep: waits for so many seconds.
        frames: to draw; None: without an end on a terminal.
    """
    views = [RunView(run) for run in runs]
    terminal = stream.isatty() and os.environ.get("TERM", "dumb") != "dumb"
    style = Style(colours=terminal and not os.environ.get("NO_COLOR"), blocks=_takes_blocks(stream))
    if not terminal:
        columns = shutil.get_terminal_size((_PIPE_COLUMNS, 0)).columns  # or as COLUMNS says
        for view in views:
            stream.write("".join(f"{line}\n" for line in view.lines(columns, None, style)))
        stream.flush()
        return
    stream.write("\x1b[?1049h\x1b[?25l")
    try:
        while frames is None or frames > 0:
            columns, rows = shutil.get_terminal_size()
            height = max(8, (rows - 1) // len(views))
            drawn = [line for view in views for line in view.lines(columns, height, style)]
            # Each line ends what an older, longer one has left, and so does the last for the rest.
            frame = "\x1b[K\n".join(drawn[: rows - 1])
            stream.write(f"\x1b[H{frame}\x1b[K\x1b[J")
            stream.flush()
            frames = None if frames is None else frames - 1
            sleep(EVERY_SECONDS)
    except KeyboardInterrupt:
        return
    finally:
        stream.write("\x1b[?25h\x1b[?1049l")
        stream.flush()


def _takes_blocks(stream: TextIO) -> bool:
    try:
        _BLOCKS.encode(stream.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


@dataclass(frozen=True, slots=True)
class Style:
    """What a terminal takes.

    Attributes:
        colours: whether to colour what matters.
        blocks: whether it has the characters of sparklines.
    """

    colours: bool
    blocks: bool

    def painted(self, words: str, code: str) -> str:
        """Return words in a colour, or bold."""
        return f"\x1b[{code}m{words}\x1b[0m" if self.colours else words

    def sparkline(self, values: Sequence[float], columns: int) -> str:
        """Return a curve in a line: the mean of every stretch."""
        marks = _BLOCKS if self.blocks else _LETTERS
        if not values or columns < 1:
            return ""
        count = min(columns, len(values))
        means = []
        for i in range(count):
            part = values[i * len(values) // count : (i + 1) * len(values) // count]
            means.append(sum(value / len(part) for value in part))
        low, high = min(means), max(means)
        # Halves, as the distance of the largest numbers is none.
        height = high / 2 - low / 2
        parts = ((mean / 2 - low / 2) / height if height else 0.0 for mean in means)
        return "".join(marks[round(part * (len(marks) - 1))] for part in parts)

    def bar(self, share: float, columns: int) -> str:
        """Return how much of something is done."""
        done = round(min(max(share, 0.0), 1.0) * columns)
        full, rest = ("█", "░") if self.blocks else ("#", ".")
        return full * done + rest * (columns - done)


@dataclass(slots=True)
class _Tail:
    """A file that grows, read on from where it was."""

    identity: str = ""
    place: int = 0


@dataclass(frozen=True, slots=True)
class _Host:
    """What is shown of a host, for as long as its file does not grow."""

    size: int
    cells: tuple[str, ...] | None
    slow: list[dict[str, Any]]


@dataclass(slots=True)
class RunView:
    """What is drawn of one run; it remembers what it has read."""

    run: RunFiles
    _tail: _Tail = field(default_factory=_Tail)
    _series: dict[str, list[float]] = field(default_factory=dict)
    _pace: list[tuple[int, float]] = field(default_factory=list)
    _newest: dict[str, Any] = field(default_factory=dict)
    _hosts: dict[str, _Host] = field(default_factory=dict)

    def lines(self, columns: int, rows: int | None, style: Style) -> list[str]:
        """Return the screen of the run.

        Args:
            columns: width of it.
            rows: its height; None: as it comes.
            style: what the terminal takes.
        """
        columns = max(columns, LEAST_COLUMNS)
        self._read_metrics()
        facts = self.run.facts()
        drawn = [*self._head(facts, columns, style), ""]
        drawn += [*self._metrics(columns, style, rows), ""]
        if machines := self._machines(columns, style, rows):
            drawn += [*machines, ""]
        left = _LOG_LINES if rows is None else max(3, rows - len(drawn))
        drawn += self._log(columns, left)
        return drawn if rows is None else drawn[:rows]

    def _head(self, facts: Mapping[str, Any], columns: int, style: Style) -> Iterator[str]:
        state = str(facts["state"])
        name = text.printable(self.run.name)
        # Cut before it is painted: codes take no room.
        title = _cut(f"{name}  ", columns - len(state))
        yield style.painted(title, "1") + style.painted(state, _STATE_COLOURS.get(state, "33"))
        for line in text.printable_lines(str(facts["explanation"])).splitlines()[:2]:
            yield _cut(line, columns)
        step = max(int(facts["step"] or 0), int(self._newest.get("step", 0)))
        share, words = _progress(facts, step, self._newest.get("epoch"))
        if (left := self._seconds_left(facts, step)) is not None and state == "running":
            words += f"  {text.duration(left)} left"
        if share is None:
            yield _cut(words, columns)
        else:
            room = max(10, min(40, columns - len(words) - 7))
            yield _cut(f"{style.bar(share, room)} {100 * share:3.0f} % {words}", columns)
        jobs = facts["jobs"]
        if jobs:
            last = jobs[-1]
            where = f", {text.plural(last['nodes'], 'node')}" if last["nodes"] else ""
            ranks = f", {text.plural(last['ranks'], 'rank')}" if last["ranks"] else ""
            batch = f", {last['job']}" if last["job"] else ""
            yield _cut(text.printable(f"job {last['number']}{batch}{ranks}{where}"), columns)

    def _metrics(self, columns: int, style: Style, rows: int | None) -> Iterator[str]:
        names = sorted(self._series, key=_importance)
        shown = names if rows is None else names[: max(3, rows // 3)]
        width = max((len(text.printable(name)) for name in shown), default=0)
        width = min(width, columns // 2 - 8)
        for name in shown:
            values = self._series[name]
            value = text.metric(values[-1])
            label = _cut(text.printable(name), width).ljust(width)
            yield f"{label} {value:>10} {style.sparkline(values, columns - width - 12)}"
        if len(shown) < len(names):
            yield _cut(f"and {len(names) - len(shown)} more: watch with --serve", columns)
        if not names:
            yield "no metrics yet"

    def _machines(self, columns: int, style: Style, rows: int | None) -> list[str]:
        """Return a line a node, how many more there are, and who is slow."""
        files = [each for each in self.run.growing() if each.name.startswith(f"{MACHINE}/")]
        found, slow = [], []
        for each in files:
            known = self._hosts.get(each.name)
            if known is None or known.size != each.size:
                most = min(_TAIL_BYTES, _HOSTS_BYTES // len(files))
                known = self._hosts[each.name] = self._host(each, most)
            slow += known.slow
            if known.cells is not None:
                found.append(known.cells)
        if not found:
            return []
        most = len(found) if rows is None else max(2, rows // 4)
        table = text.table([("node", "CPU", "memory", "device", "watts", "step"), *found[:most]])
        drawn = [style.painted(_cut(table[0], columns), "1")]
        drawn += [_cut(line, columns) for line in table[1:]]
        if len(found) > most:
            drawn.append(f"and {text.plural(len(found) - most, 'more node', 'more nodes')}")
        for record in slow[-3:]:
            words = f"slow: rank {record.get('rank')} on {record.get('host')}"
            drawn.append(style.painted(_cut(text.printable(words), columns), "33"))
        return drawn

    def _host(self, file: GrowingFile, most_bytes: int) -> _Host:
        """Return what the end of a host's figures says."""
        records = list(self._tail_records(file.name, file.size, most_bytes))
        newest = next((one for one in reversed(records) if one["kind"] == "machine"), None)
        host = file.name.removeprefix(f"{MACHINE}/").removesuffix(".jsonl")
        return _Host(
            size=file.size,
            cells=None if newest is None else (text.printable(host), *_figures(newest)),
            slow=[record for record in records if record["kind"] == "straggler"],
        )

    def _log(self, columns: int, count: int) -> list[str]:
        size = next((each.size for each in self.run.growing() if each.name == LOG), 0)
        try:
            content = self.run.piece(LOG, max(0, size - _TAIL_BYTES), _TAIL_BYTES)
        except OSError:
            return []
        lines = content.decode("utf-8", "replace").splitlines()
        return [_cut(text.printable(line), columns) for line in lines[-count:]]

    def _tail_records(self, name: str, size: int, most_bytes: int) -> Iterator[dict[str, Any]]:
        try:
            content = self.run.piece(name, max(0, size - most_bytes), most_bytes)
        except OSError:
            return
        for line in content.split(b"\n"):
            if (record := from_line(line + b"\n")) is not None:
                yield record

    def _read_metrics(self) -> None:
        """Read on in the metrics; from the start once a resume has cut them back."""
        tail = self._tail
        file = next((each for each in self.run.growing() if each.name == JSONL_FILE), None)
        if file is None:
            return
        if file.identity != tail.identity or file.size < tail.place:
            self._series.clear()
            self._pace.clear()
            self._tail = tail = _Tail(file.identity, max(0, file.size - _FIRST_BYTES))
        for place, line in self.run.lines(file.name, tail.place):
            if line.endswith(b"\n"):  # else it is not yet whole, or never will be
                tail.place = place
            if (record := from_line(line)) is not None:
                self._take(record)

    def _take(self, record: Mapping[str, Any]) -> None:
        self._newest = dict(record)
        group = record.get("split", record["kind"])
        for key, value in flat(record).items():
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if is_number and key not in _OF_THE_LINE and not key.startswith("seconds."):
                name = f"{group} {key}"
                if name not in self._series and len(self._series) >= _MOST_SERIES:
                    continue
                values = self._series.setdefault(name, [])
                values.append(float(value))
                if len(values) > _MOST_POINTS:
                    del values[:-1:2]  # every second one is enough for a line of a terminal
        moment = record.get(WALL_TIME)
        if record["kind"] == "train" and isinstance(moment, int | float):
            self._pace = [*self._pace[-19:], (record["step"], float(moment))]

    def _seconds_left(self, facts: Mapping[str, Any], step: int) -> float | None:
        last = facts["max_steps"]
        if not isinstance(last, int) or len(self._pace) < 2:
            return None
        (first, then), (newest, now) = self._pace[0], self._pace[-1]
        if newest <= first or now <= then:
            return None
        return max(0, last - step) * (now - then) / (newest - first)


def _progress(facts: Mapping[str, Any], step: int, epoch: object) -> tuple[float | None, str]:
    """Return what part of a run is done, None if nobody knows, and words for it."""
    steps, epochs = facts["max_steps"], facts["max_epochs"]
    if isinstance(steps, int) and steps > 0:
        return step / steps, f"step {step:,} of {steps:,}"
    if isinstance(epochs, int) and epochs > 0 and isinstance(epoch, int):
        return (epoch + 1) / epochs if facts["state"] == "complete" else epoch / epochs, (
            f"step {step:,}, epoch {epoch} of {epochs}"
        )
    return None, f"step {step:,}"


def _importance(name: str) -> tuple[int, str]:
    """Return by what names are sorted: losses first, then evaluations, then the rest."""
    group, _, key = name.partition(" ")
    return (0 if key == "loss" else 1 if group != "train" else 2, name)


def _figures(record: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the cells of a node by the newest line of its figures."""
    cpu, memory = _mapping(record, "cpu"), _mapping(record, "memory")
    devices, ranks = _mapping(record, "devices"), _mapping(record, "ranks")
    used, total = memory.get("used"), memory.get("total")
    full = used / total if _is_number(used) and _is_number(total) and total else None
    steps = [each for each in _numbers(ranks.get("step")) if each]
    watts = _numbers(devices.get("watts"))
    busy = _numbers(devices.get("busy"))
    return (
        _part(cpu.get("busy")),
        _part(full),
        _part(sum(busy) / len(busy) if busy else None),
        f"{sum(watts):,.0f}" if watts else "-",
        f"{max(steps):.3g} s" if steps else "-",
    )


def _mapping(record: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = record.get(key)
    return value if isinstance(value, Mapping) else {}


def _numbers(values: object) -> list[float]:
    return [float(each) for each in values if _is_number(each)] if isinstance(values, list) else []


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _part(value: object) -> str:
    return f"{100 * float(value):.0f} %" if _is_number(value) else "-"  # type: ignore[arg-type]


def _cut(line: str, columns: int) -> str:
    """Return a line that fits."""
    return line if len(line) <= columns else f"{line[: max(0, columns - 3)]}..."
