"""Where metrics go: metrics.jsonl, metrics.csv, TensorBoard. Each takes records, all or none."""

from __future__ import annotations

import csv
import io
import socket
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from hpctrain.observe.records import Record, flat, from_line, to_line, to_row
from hpctrain.utils.files import AppendedFile, open_file, replacing
from hpctrain.utils.permissions import follow_folder

_TAIL_BYTES = 2**18
"""Of metrics.jsonl, in which the newest records are looked for."""


class Sink(Protocol):
    """Something that takes records."""

    path: Path

    def append(self, records: Sequence[Record]) -> None:
        """Take all of the records.

        Raises:
            OSError: if it took none of them.
        """
        ...

    def close(self) -> None:
        """Give up the file.

        Raises:
            OSError: if it may not have got to the disk.
        """
        ...


class JsonLines:
    """metrics.jsonl: one JSON object a line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = AppendedFile(path)

    def append(self, records: Sequence[Record]) -> None:
        self._file.append(b"".join(map(to_line, records)))

    def close(self) -> None:
        self._file.close()


class CsvTable:
    """metrics.csv: the same as a table, with a column for every key that ever came.

    Args:
        path: the file; what it holds is replaced.
        history: the records to begin with, each time from the start.
    """

    def __init__(self, path: Path, history: Callable[[], Iterable[Record]]) -> None:
        self.path = path
        columns: dict[str, None] = {}
        for record in history():
            columns.update(dict.fromkeys(flat(record)))
        self._columns = list(columns)
        with replacing(path) as file:
            file.write(to_row(self._columns) if self._columns else b"")
            for record in history():
                file.write(self._row(flat(record)))
        self._file = AppendedFile(path)

    def append(self, records: Sequence[Record]) -> None:
        rows = [flat(record) for record in records]
        columns = dict.fromkeys(self._columns)
        for row in rows:
            columns.update(dict.fromkeys(row))
        if len(columns) > len(self._columns):
            self._widen(list(columns))
        self._file.append(b"".join(map(self._row, rows)))

    def close(self) -> None:
        self._file.close()

    def _row(self, row: dict[str, Any]) -> bytes:
        return to_row([row.get(column) for column in self._columns])

    def _widen(self, columns: list[str]) -> None:
        """Write the file anew with more columns, at the right, empty in the rows that are there.

        Can be repeated, should it fail on the way.
        """
        with (
            self.path.open(encoding="utf-8", newline="") as old,
            replacing(self.path) as new,
        ):
            new.write(to_row(columns))
            rows = csv.reader(old)
            next(rows, None)
            for row in rows:
                new.write(to_row(row + [""] * (len(columns) - len(row))))
        opened = AppendedFile(self.path)
        self._file.close()
        self._file, self._columns = opened, columns


class TensorBoard:
    """TensorBoard's event files, by its own message types; without TensorFlow and threads.

    A file a job. The first says from which step on this job's values hold, so that TensorBoard
    drops those of an earlier job that had gone further.

    Args:
        folder: of all event files of this run.
        first_step: the first step of this job.

    Raises:
        ModuleNotFoundError: named "tensorboard" where that is not installed.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._record_writer = RecordWriter
        self._event = event_pb2.Event
        self._summary = summary_pb2.Summary
        folder.mkdir(exist_ok=True)
        follow_folder(folder)
        stamp = f"{time.time_ns() / 1e9:.6f}.{socket.gethostname()}"
        self.path = folder / f"events.out.tfevents.{stamp}"
        self._file = AppendedFile(self.path)
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._write(
            [
                self._event(wall_time=time.time(), file_version="brain.Event:2"),
                self._event(wall_time=time.time(), step=first_step, session_log=start),
            ]
        )

    def append(self, records: Sequence[Record]) -> None:
        self._write([self._scalars(record) for record in records])

    def close(self) -> None:
        self._file.close()

    def _scalars(self, record: Record) -> Any:
        group = record.get("split", record["kind"])
        values = [
            self._summary.Value(tag=f"{group}/{key.replace('.', '/')}", simple_value=value)
            for key, value in flat(record).items()
            if key != "step" and isinstance(value, (int, float)) and not isinstance(value, bool)
        ]
        return self._event(
            wall_time=time.time(), step=record["step"], summary=self._summary(value=values)
        )

    def _write(self, events: Sequence[Any]) -> None:
        buffer = io.BytesIO()
        writer = self._record_writer(buffer)
        for event in events:
            writer.write(event.SerializeToString())
        self._file.append(buffer.getvalue())


def read_records(path: Path) -> Iterable[dict[str, Any]]:
    """Yield the whole records of a metrics.jsonl, in its order.

    Raises:
        OSError: if it cannot be read.
    """
    with open_file(path) as file:
        for line in file:
            if (record := from_line(line)) is not None:
                yield record


def newest_records(path: Path) -> dict[str, dict[str, Any]]:
    """Return the newest records of training and of each evaluation, flat; none without a file."""
    try:
        with open_file(path) as file:
            file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            lines = file.readlines()
    except OSError:
        return {}
    found: dict[str, dict[str, Any]] = {}
    for line in reversed(lines):
        record = from_line(line)
        if record is not None:
            found.setdefault(str(record.get("split", record["kind"])), flat(record))
    return dict(sorted(found.items()))


def cut_back(path: Path, last_step: int, again: str | None = None) -> int:
    """Take from a metrics.jsonl what lies after a step, and torn lines; return how many lines.

    Records of the kind `again` at the step itself go too: they are about to be written once more.

    Raises:
        OSError: if it cannot be read or replaced; it is then as it was.
    """

    def kept(line: bytes) -> bool:
        record = from_line(line)
        if record is None or record["step"] > last_step:
            return False
        return again is None or record["step"] < last_step or record["kind"] != again

    with open_file(path) as file:
        num_cut = sum(not kept(line) for line in file)
    if num_cut:
        with open_file(path) as old, replacing(path) as new:
            new.writelines(filter(kept, old))
    return num_cut
