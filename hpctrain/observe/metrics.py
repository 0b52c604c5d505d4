"""The metrics of a run: metrics.jsonl for programs, metrics.csv for spreadsheets, TensorBoard.

Training does not end for want of metrics. What cannot be written waits in memory, is reported once,
and is tried again. Each file takes records, all or none.
"""

from __future__ import annotations

import csv
import errno
import io
import itertools
import logging
import socket
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

from hpctrain.errors import CheckpointError
from hpctrain.observe.records import (
    WALL_TIME,
    Histogram,
    Image,
    Record,
    cut_back,
    flat,
    read_records,
    tagged,
    to_line,
    to_row,
)
from hpctrain.observe.trackers import CLOSE_SECONDS, Handing
from hpctrain.utils import text
from hpctrain.utils.files import AppendedFile, replacing
from hpctrain.utils.permissions import follow_folder

JSONL_FILE = "metrics.jsonl"

CSV_FILE = "metrics.csv"

TENSORBOARD_FOLDER = "tensorboard"

RETRY_SECONDS = 30.0

MAX_WAITING = 10_000
"""Records that wait for a disk; then the oldest are given up."""

_HPARAMS_STATUS = {"success": 1, "failed": 2}
"""As tensorboard.plugins.hparams.api_pb2.Status numbers them."""

_FULL = (errno.ENOSPC, errno.EDQUOT)

_logger = logging.getLogger(__name__)


class MetricsWriter:
    """Writes records to metrics.jsonl and metrics.csv, and for TensorBoard where it is installed.

    For one rank only. Every record is with the operating system when `write` returns.

    Args:
        run_folder: an existing folder.
        resume_step: the step that the run continues from: what was written after it, by a job
            that had gone further, is cut off, so that no step is there twice. None: a new run;
            metrics of an older one are put aside under another name.
        again: a kind of record that is about to be written once more at `resume_step` itself.
        hyperparameters: the config, flat, for TensorBoard.
        clock: seconds, monotonic.
        now: seconds since 1970, which every record is given as its "wall_time".

    Raises:
        CheckpointError: if the files cannot be made.
    """

    def __init__(
        self,
        run_folder: Path,
        resume_step: int | None,
        *,
        again: str | None = None,
        hyperparameters: Mapping[str, Any] = MappingProxyType({}),
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
    ) -> None:
        try:
            sinks = _open(run_folder, resume_step, again)
            self._tensorboard = _open_tensorboard(run_folder, resume_step, hyperparameters)
        except OSError as error:
            raise CheckpointError(
                f"cannot write metrics in {run_folder}: {error}\n"
                "  fix: make the run folder writable and free some space, or choose another by "
                "run.directory"
            ) from error
        self._clock = clock
        self._now = now
        if self._tensorboard is not None:
            sinks.append(self._tensorboard)
        self._queues = [_Queue(sink, clock) for sink in sinks]
        self._endings: list[Callable[[], None]] = []
        self._handings: list[Handing] = []
        self._is_closed = self._warned_of_media = False

    def at_close(self, end: Callable[[], None]) -> None:
        """Have something else end with this."""
        self._endings.append(end)

    def hand_to(self, handings: Iterable[Handing]) -> None:
        """Have further records handed to trackers, too."""
        self._handings += handings

    def write(self, record: Record) -> None:
        """Write a record: "kind", "step", and values that JSON knows, nested or not."""
        record = {**record, WALL_TIME: record.get(WALL_TIME, round(self._now(), 3))}
        for queue in self._queues:
            queue.put(record)
        for handing in self._handings:
            handing.put(record)

    def write_media(self, item: Image | Histogram) -> None:
        """Write an image or a histogram, for TensorBoard and trackers."""
        if self._tensorboard is not None:
            with suppress(OSError):  # the next line of metrics reports that nothing can be written
                self._tensorboard.add_media(item)
        elif not self._handings and not self._warned_of_media:
            self._warned_of_media = True
            _logger.warning(
                "%s and what else is logged as images and histograms goes nowhere: they are for "
                "TensorBoard (pip install 'hpctrain[tensorboard]') and [[trackers]]",
                item.name,
            )
        for handing in self._handings:
            handing.put(item)

    def write_event(self, event: Any) -> None:
        """Write an event of TensorBoard's own types, such as its SummaryWriter makes."""
        if self._tensorboard is not None and not self._is_closed:
            with suppress(OSError):
                self._tensorboard.add_event(event)

    def close(self, status: str = "success") -> None:
        """Write what still waits, and close the files; a second time does nothing.

        Args:
            status: "success", or "failed".
        """
        if self._is_closed:
            return
        self._is_closed = True
        if self._tensorboard is not None:
            with suppress(OSError):
                self._tensorboard.end(status)
        for queue in self._queues:
            queue.close()
        for end in self._endings:
            end()
        for handing in self._handings:
            handing.end(status)  # all of them, so that several that hang take no longer than one
        deadline = time.monotonic() + CLOSE_SECONDS
        for handing in self._handings:
            handing.close(status, max(0.0, deadline - time.monotonic()))


class _Queue:
    """Records on their way to a sink: none waits, unless the sink has failed."""

    def __init__(self, sink: Sink, clock: Callable[[], float]) -> None:
        self._sink = sink
        self._clock = clock
        self._waiting: deque[Record] = deque()
        self._num_given_up = 0
        self._failing = False
        self._retry_at = 0.0

    def put(self, record: Record) -> None:
        self._waiting.append(record)
        if len(self._waiting) > MAX_WAITING:
            self._waiting.popleft()
            self._num_given_up += 1
        if not self._failing or self._clock() >= self._retry_at:
            self._flush()

    def close(self) -> None:
        if self._waiting:
            self._flush()
        self._num_given_up += len(self._waiting)
        try:
            self._sink.close()
        except OSError as error:
            _logger.warning("%s may not be whole: %s", self._sink.path, error.strerror)
        if self._num_given_up:
            lost = text.plural(self._num_given_up, "record")
            _logger.warning("%s: %s could not be written and are lost", self._sink.path, lost)

    def _flush(self) -> None:
        try:
            self._sink.append(list(self._waiting))
        except OSError as error:
            if not self._failing:
                _logger.warning(
                    "cannot write %s: %s. Training goes on; what is measured is kept in memory "
                    "and written once it can be.%s",
                    self._sink.path,
                    error.strerror,
                    " Free some space in the run folder." if error.errno in _FULL else "",
                )
            self._failing = True
            self._retry_at = self._clock() + RETRY_SECONDS
            return
        if self._failing:
            self._failing = False
            written = text.plural(len(self._waiting), "record")
            _logger.info("%s can be written again: %s added", self._sink.path, written)
        self._waiting.clear()


def _open(folder: Path, resume_step: int | None, again: str | None) -> list[Sink]:
    lines = folder / JSONL_FILE
    if resume_step is None:
        _put_aside(lines)
    elif lines.exists():
        num_cut = cut_back(lines, resume_step, again)
        if num_cut:
            _logger.info(
                "%s: %s after step %s cut off",
                lines.name,
                text.plural(num_cut, "line"),
                resume_step,
            )
    # The table is made anew from the lines, so that the two agree whatever happened to it.
    return [JsonLines(lines), CsvTable(folder / CSV_FILE, lambda: read_records(lines))]


def _open_tensorboard(
    folder: Path, resume_step: int | None, hyperparameters: Mapping[str, Any]
) -> TensorBoard | None:
    """Return what writes for TensorBoard; None where that is not installed."""
    first_step = 0 if resume_step is None else resume_step + 1
    try:
        return TensorBoard(folder / TENSORBOARD_FOLDER, first_step, hyperparameters)
    except ModuleNotFoundError as error:
        if error.name != "tensorboard":
            _logger.warning("no TensorBoard events: it is installed, but not whole: %s", error)
    return None


def _put_aside(path: Path) -> None:
    """Rename a file that holds something to the first free name of its kind."""
    if not path.exists() or path.stat().st_size == 0:
        return
    names = (path.with_name(f"{path.stem}-old-{i}{path.suffix}") for i in itertools.count(1))
    aside = next(name for name in names if not name.exists())
    path.rename(aside)
    _logger.info("metrics of an older run are now in %s", aside)


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
        hyperparameters: of the run, for the table of them.

    Raises:
        ModuleNotFoundError: named "tensorboard" where that is not installed.
    """

    def __init__(
        self,
        folder: Path,
        first_step: int,
        hyperparameters: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        from tensorboard.compat.proto import event_pb2, histogram_pb2, summary_pb2
        from tensorboard.plugins.hparams import plugin_data_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._record_writer = RecordWriter
        self._event = event_pb2.Event
        self._summary = summary_pb2.Summary
        self._histogram = histogram_pb2.HistogramProto
        self._plugin_data = plugin_data_pb2.HParamsPluginData
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
                self._hyperparameters(hyperparameters),
            ]
        )

    def append(self, records: Sequence[Record]) -> None:
        self._write([self._scalars(record) for record in records])

    def close(self) -> None:
        self._file.close()

    def add_media(self, item: Image | Histogram) -> None:
        """Write an image or a histogram.

        Raises:
            OSError: if it cannot be written.
        """
        if isinstance(item, Image):
            image = self._summary.Image(
                height=item.height,
                width=item.width,
                colorspace=item.channels,
                encoded_image_string=item.png(),
            )
            value = self._summary.Value(tag=item.name, image=image)
        else:
            histogram = self._histogram(
                min=item.edges[0],
                max=item.edges[-1],
                num=sum(item.counts),
                sum=item.total,
                sum_squares=item.squares,
                bucket_limit=item.edges[1:],
                bucket=item.counts,
            )
            value = self._summary.Value(tag=item.name, histo=histogram)
        summary = self._summary(value=[value])
        self._write([self._event(wall_time=item.wall_time, step=item.step, summary=summary)])

    def add_event(self, event: Any) -> None:
        """Write an event.

        Raises:
            OSError: if it cannot be written.
        """
        self._write([event])

    def end(self, status: str) -> None:
        """Write how the job ends, "success" or "failed".

        Raises:
            OSError: if it cannot be written.
        """
        data = self._plugin_data(version=0)
        data.session_end_info.status = _HPARAMS_STATUS[status]
        data.session_end_info.end_time_secs = time.time()
        self._write([self._about_session("_hparams_/session_end_info", data)])

    def _hyperparameters(self, values: Mapping[str, Any]) -> Any:
        """Return the row of this run in the table of hyperparameters.

        Its columns of metrics are the newest scalars, which TensorBoard finds by itself.
        """
        data = self._plugin_data(version=0)
        info = data.session_start_info
        info.start_time_secs = time.time()
        for key, value in values.items():
            if isinstance(value, bool):
                info.hparams[key].bool_value = value
            elif isinstance(value, int | float):
                info.hparams[key].number_value = value
            else:
                info.hparams[key].string_value = str(value)
        return self._about_session("_hparams_/session_start_info", data)

    def _about_session(self, tag: str, data: Any) -> Any:
        """Return an event of the plug-in for hyperparameters; to import that takes 0.5 s."""
        value = self._summary.Value(tag=tag)
        value.metadata.plugin_data.plugin_name = "hparams"
        value.metadata.plugin_data.content = data.SerializeToString()
        # As tensorboard.plugins.hparams.metadata.NULL_TENSOR.
        value.tensor.dtype = 1
        value.tensor.tensor_shape.dim.add().size = 0
        return self._event(wall_time=time.time(), summary=self._summary(value=[value]))

    def _scalars(self, record: Record) -> Any:
        values = [
            self._summary.Value(tag=tag, simple_value=value)
            for tag, value in tagged(record).items()
        ]
        return self._event(
            wall_time=record[WALL_TIME], step=record["step"], summary=self._summary(value=values)
        )

    def _write(self, events: Sequence[Any]) -> None:
        buffer = io.BytesIO()
        writer = self._record_writer(buffer)
        for event in events:
            writer.write(event.SerializeToString())
        self._file.append(buffer.getvalue())
