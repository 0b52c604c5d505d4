"""Saving: a host copy at once, the rest in a thread; whole under the final name or not there.

Rank 0 has a `CheckpointManager`, which decides what stays too; where every rank writes its own
part, the others have a `PartWriter`.
"""

from __future__ import annotations

import errno
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from hpctrain.checkpoint.best import Best, Mode, Preference
from hpctrain.checkpoint.format import (
    check_file,
    evaluations,
    newest_first,
    put_back,
    read_meta,
    set_aside,
    those_aside,
)
from hpctrain.checkpoint.safetensors_files import Written
from hpctrain.checkpoint.save import HostCopies, Snapshot, aliases, write_files, write_part
from hpctrain.errors import CheckpointError
from hpctrain.utils.files import replace_file, sync
from hpctrain.utils.permissions import explained, follow_folder, open_tree_to_group
from hpctrain.utils.run_folder import CHECKPOINTS, LATEST, folder_name, step_of

_TRIES = 2
_PAUSE_SECONDS = 1.0

Outcome = dict[str, Written] | str
"""The files of a part, or why they could not be written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Retention:
    """Which checkpoints stay; pure.

    Attributes:
        keep_last: number of the newest that stay.
        keep_every: steps between those that stay for ever; 0: none.
        metric: name of the evaluation's metric by which the best stays too; None: no best.
        mode: direction of the metric that is better.
        keep_best_count: how many of the best stay.
    """

    keep_last: int
    keep_every: int = 0
    metric: str | None = None
    mode: Mode = "min"
    keep_best_count: int = 1

    @property
    def preference(self) -> Preference | None:
        """Metric and direction by which the best is found; None: no best."""
        if self.metric is None:
            return None
        return Preference(self.metric, self.mode, self.keep_best_count)

    def surplus(self, checkpoints: Sequence[tuple[int, Mapping[str, float] | None]]) -> list[int]:
        """Return the steps to delete.

        Args:
            checkpoints: (step, metrics of an evaluation at that step) of every whole one.
        """
        steps = sorted(step for step, _ in checkpoints)
        kept = set(steps[-self.keep_last :])
        if self.keep_every:
            kept |= {step for step in steps if step % self.keep_every == 0}
        if self.preference is not None:
            kept |= {best.step for best in self.preference.ranked(checkpoints)}
        return [step for step in steps if step not in kept]


class CheckpointManager:
    """The checkpoints of one run. For rank 0 only.

    Args:
        run_folder: holds `checkpoints/` and the pointer `latest`.
        retention: rule for which checkpoints stay.
        confirm: called before every rename; raises if this job no longer owns the folder.
        warn: sink of what a user should know.
        saved_within: sink of the seconds of every save, from its first copy until it is on disk.

    Attributes:
        stall_seconds: seconds that training has waited for saves so far.
        folder: home of all checkpoints.
    """

    def __init__(
        self,
        run_folder: Path,
        *,
        retention: Retention,
        confirm: Callable[[], None],
        warn: Callable[[str], None],
        saved_within: Callable[[float], None] = lambda _: None,
    ) -> None:
        self.stall_seconds = 0.0
        self.newest: Path | None = None
        self._run_folder = run_folder
        self.folder = self._checkpoints = run_folder / CHECKPOINTS
        self._retention = retention
        self._confirm = confirm
        self._warn = warn
        self._saved_within = saved_within
        self._host = HostCopies()
        self._thread: threading.Thread | None = None
        self._failure: CheckpointError | None = None
        try:
            self._checkpoints.mkdir(parents=True, exist_ok=True)
            follow_folder(self._checkpoints)
            put_back(self._checkpoints)
            for leftover in self._checkpoints.glob(".*"):
                shutil.rmtree(leftover, ignore_errors=True)
        except OSError as error:
            problem = _fact_of(error)
            raise CheckpointError(f"cannot use {self._checkpoints}: {problem}") from error

    def save(self, snapshot: Snapshot) -> None:
        """Copy a snapshot to the host, what it lends meanwhile, and write it in the background.

        Waits for a save that is still running, and warns of it.

        Raises:
            CheckpointError: if the save before has failed.
        """
        begin = time.perf_counter()
        self.report_waiting()
        self.finish()
        tied = {**aliases(snapshot.model), **snapshot.tied}
        single = {name: item for name, item in snapshot.model.items() if name not in tied}
        model, training = self._host.copies(snapshot, single)
        lent = self._host.copy_later("lent", snapshot.lent)
        copied = replace(
            snapshot,
            model=model,
            training=training | lent.host,
            lent={},
            preference=self._retention.preference,
        )

        def write() -> None:
            try:
                lent.make()
            except CheckpointError as error:
                self._failure = error
                return
            self._write(copied, tied, begin)

        self._thread = threading.Thread(target=write, name="hpctrain-checkpoint")
        # One that waits for other ranks must not outlive a job that they have left.
        self._thread.daemon = snapshot.spread is not None
        self._thread.start()
        self.stall_seconds += time.perf_counter() - begin

        def wait() -> None:
            begin = time.perf_counter()
            lent.wait()
            self.stall_seconds += time.perf_counter() - begin

        snapshot.lend(wait)

    def report_waiting(self) -> None:
        """Warn that training waits for a save, if one is still being written."""
        if self._thread is not None and self._thread.is_alive():
            self._warn("the save before is still being written: training waits for it")

    @property
    def failed(self) -> bool:
        """Whether the last save has failed; the next call to `save` or `finish` says of what."""
        return self._failure is not None

    def require_space(self, needed: int) -> None:
        """Check for space before there is anything to lose.

        Warns where there is not enough for all the checkpoints that are to be kept.

        Args:
            needed: bytes of one checkpoint, about.

        Raises:
            CheckpointError: if there is not enough for a single one.
        """
        try:
            free = shutil.disk_usage(self._checkpoints).free
        except OSError as error:
            raise CheckpointError(
                f"cannot tell the free space of {self._checkpoints}: {error}"
            ) from error
        there = len(list(newest_first(self._checkpoints)))
        # One more than stays: the oldest goes only after the newest is whole.
        wanted = max(1, self._retention.keep_last + 1 - there) * needed
        facts = (
            f"{free / 1e6:,.0f} MB are free in {self._checkpoints}, a checkpoint takes about "
            f"{needed / 1e6:,.0f} MB"
        )
        if free < needed:
            raise CheckpointError(f"{facts}: free some space, or set run.directory")
        if free < wanted:
            self._warn(
                f"{facts}, and checkpoint.keep_last = {self._retention.keep_last} with one more "
                f"while it is written take {wanted / 1e6:,.0f} MB"
            )

    def poll(self) -> None:
        """Raise the failure of the last save, if it failed."""
        if self._failure is not None:
            raise self._failure

    def finish(self) -> None:
        """Wait until the last save is on disk.

        Raises:
            CheckpointError: if it failed.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.poll()

    def _write(self, snapshot: Snapshot, tied: Mapping[str, str], begin: float) -> None:
        for attempt in range(1, _TRIES + 1):
            try:
                self._write_once(snapshot, tied)
            except CheckpointError as error:  # the folder belongs to another job now
                self._failure = error
                return
            except OSError as error:
                if attempt < _TRIES:
                    self._warn(
                        f"saving step {snapshot.step} failed, trying again: {_fact_of(error)}"
                    )
                    time.sleep(_PAUSE_SECONDS)
                    continue
                shutil.rmtree(self._temporary(snapshot.step), ignore_errors=True)
                self._failure = CheckpointError(
                    f"cannot save step {snapshot.step} to {self._checkpoints}: "
                    f"{_fact_of(error)}. What was saved before is untouched; {_advice_on(error)}, "
                    "or set run.directory"
                )
            else:
                self._saved_within(time.perf_counter() - begin)
                return

    def _write_once(self, snapshot: Snapshot, tied: Mapping[str, str]) -> None:
        name = folder_name(snapshot.step)
        temporary = self._temporary(snapshot.step)
        if snapshot.spread is None:
            shutil.rmtree(temporary, ignore_errors=True)  # before space is checked
        self._require_space(snapshot)
        if snapshot.spread is None:
            temporary.mkdir()
        write_files(temporary, snapshot, tied)
        follow_folder(temporary)
        open_tree_to_group(temporary)
        self._confirm()
        final = self._checkpoints / name
        if final.exists():
            # os.replace puts no folder in the place of one that is not empty.
            set_aside(final)
        os.replace(temporary, final)
        sync(self._checkpoints)
        self._point_to(name)
        self.newest = final
        self._delete_surplus(final)

    def open_folder(self, step: int) -> Path:
        """Return a new folder for a checkpoint that all ranks write to, before they do.

        Raises:
            CheckpointError: if there can be none.
        """
        temporary = self._temporary(step)
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
        except OSError as error:
            raise CheckpointError(f"cannot save step {step}: {error}") from error
        return temporary

    def _temporary(self, step: int) -> Path:
        # In the same folder: only there a rename is one, and its space is what is checked.
        return self._checkpoints / f".{folder_name(step)}.tmp"

    def _require_space(self, snapshot: Snapshot) -> None:
        needed = sum(
            tensor.numel() * tensor.element_size()
            for group in (snapshot.model, snapshot.training)
            for tensor in group.values()
        )
        if snapshot.spread is not None:
            needed *= snapshot.spread.parts
        free = shutil.disk_usage(self._checkpoints).free
        if needed > free:
            raise OSError(f"{needed / 1e6:.0f} MB needed, {free / 1e6:.0f} MB free")

    def _point_to(self, name: str) -> None:
        replace_file(self._run_folder / LATEST, f"{name}\n".encode())

    def best(self) -> Best | None:
        """Return the best of the checkpoints that are there; None: the run keeps none.

        Raises:
            CheckpointError: if they cannot be listed.
        """
        preference = self._retention.preference
        return None if preference is None else preference.best_of(evaluations(self._checkpoints))

    def _read_back(self, path: Path) -> None:
        """Make sure that the disk has what was written, before anything older is deleted.

        Raises:
            OSError: if it has not, as of any other fault of the disk.
        """
        try:
            meta = read_meta(path)
            for name in meta["files"]:
                check_file(path, name, meta)
        except CheckpointError as error:
            raise OSError(f"read back, {error}") from error

    def _delete_surplus(self, newest: Path) -> None:
        # What is newer than the newest is none of this run's: it takes no place from what is.
        last = step_of(newest.name) or 0
        known = [item for item in evaluations(self._checkpoints) if item[0] <= last]
        surplus = self._retention.surplus(known)
        if surplus:
            self._read_back(newest)
        for step in surplus:
            path = self._checkpoints / folder_name(step)
            # Out of sight first: half a deletion must not look like a checkpoint.
            hidden = self._checkpoints / f".{path.name}.deleted"
            os.replace(path, hidden)
            shutil.rmtree(hidden, ignore_errors=True)
        for leftover in those_aside(self._checkpoints):
            shutil.rmtree(leftover, ignore_errors=True)


class PartWriter:
    """Writes the parts of one rank, other than rank 0. Its thread never communicates.

    Attributes:
        done: number of parts that have been written, or have failed.
    """

    def __init__(self, part: int) -> None:
        self.done = 0
        self._part = part
        self._host = HostCopies()
        self._thread: threading.Thread | None = None
        self._outcome: Outcome = {}

    def write(self, folder: Path, snapshot: Snapshot) -> None:
        """Copy tensors to the host, what is lent meanwhile, and write them in the background.

        One part at a time.
        """
        model, training = self._host.copies(snapshot, snapshot.model)
        lent = self._host.copy_later("lent", snapshot.lent)

        def write() -> None:
            try:
                lent.make()
                self._outcome = self._write(folder, model, training | lent.host)
            except (OSError, CheckpointError) as error:
                self._outcome = str(error)
            self.done += 1

        self._thread = threading.Thread(target=write, name="hpctrain-checkpoint")
        self._thread.start()
        snapshot.lend(lent.wait)

    def skip(self) -> None:
        """Count a part that another rank writes."""
        self.done += 1

    def finish(self) -> Outcome:
        """Wait for the part that is being written, and return what has come of it."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        return self._outcome

    def _write(
        self, folder: Path, model: Mapping[str, Tensor], training: Mapping[str, Tensor]
    ) -> dict[str, Written]:
        """Write the part; once more if the file system fails."""
        try:
            return write_part(folder, model, training, self._part)
        except OSError:
            time.sleep(_PAUSE_SECONDS)
            return write_part(folder, model, training, self._part)


def _fact_of(error: OSError) -> str:
    """Return what failed, and of which file."""
    if isinstance(error, PermissionError) and error.filename:
        return explained(error, Path(str(error.filename)))
    where = f" ({error.filename})" if error.filename else ""
    return f"{error.strerror or error}{where}"


def _advice_on(error: OSError) -> str:
    """Return what helps against a fault of the file system."""
    match error.errno:
        case errno.ENOENT | errno.ENOTDIR:
            return "let nobody remove the folders of a running job"
        case errno.EROFS | errno.EACCES | errno.EPERM:
            return "make the folder writable"
        case errno.ENOSPC | errno.EDQUOT | None:
            return "free some space"
        case _:
            return "have the file system checked"
