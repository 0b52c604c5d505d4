"""Trackers: objects that are handed every line of metrics, such as W&B, MLflow or a user's own.

Each has a thread of its own and a queue with a bound: what a service takes, or that it fails, costs
no step and ends no job.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from hpctrain.observe.records import WALL_TIME, Histogram, Image, Record, tagged
from hpctrain.utils import text
from hpctrain.utils.files import create_file, open_regular
from hpctrain.utils.json_files import parse_json
from hpctrain.utils.permissions import follow_folder

FOLDER = "trackers"

MAX_WAITING = 10_000
"""Records that wait for a tracker; then the oldest are given up."""

RETRY_SECONDS = 30.0

CLOSE_SECONDS = 30.0
"""Which the end of a job waits for what is still to be handed over."""

_OF_THE_LINE = ("kind", "step", "split", WALL_TIME)

_STATE_BYTES = 4000
"""Of what is known of a tracker, at most: written at once, it is never torn."""

_logger = logging.getLogger(__name__)


class Tracker(Protocol):
    """What a tracker has; everything but `log_metrics` may be left out.

    It is what Lightning calls a logger, so that a Lightning logger is one. One that
    `[[trackers]]` names is made in its thread, on rank 0, and then has `begin_run` called.
    """

    def begin_run(self, run: TrackedRun) -> None:
        """Begin, or go on with, a run."""
        ...

    def log_hyperparams(self, params: Mapping[str, Any]) -> None:
        """Take the config: {"optimizer.lr": 0.001}."""
        ...

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Take the numbers of a line of metrics."""
        ...

    def log_image(self, key: str, images: list[Any], step: int) -> None:
        """Take an image: a list of one array, (height, width, channels) uint8."""
        ...

    def log_histogram(
        self, key: str, counts: Sequence[int], edges: Sequence[float], step: int
    ) -> None:
        """Take a histogram: how many values there are between every two edges."""
        ...

    def finalize(self, status: str) -> str | None:
        """End, as "success" or "failed"; the log says what it returns, such as what to do now."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class TrackedRun:
    """What a tracker gets to know of the run.

    Attributes:
        name: of the run.
        id: the same in all jobs of the run, and of no other run.
        folder: of this tracker, in the run folder.
        resumed: whether an earlier job of the run had this id.
    """

    name: str
    id: str
    folder: Path
    resumed: bool


class Handing:
    """Hands records to a tracker, on a thread of its own; for one rank only.

    Whatever the tracker raises waits for another try.
    """

    def __init__(
        self,
        name: str,
        begin: Callable[[], Tracker],
        *,
        named: Callable[[Record], Mapping[str, float]],
        done: Handed | None = None,
        retry_seconds: float = RETRY_SECONDS,
    ) -> None:
        """Start the thread.

        Args:
            name: of the tracker, for the log.
            begin: returns the tracker; called in the thread, again after a failure.
            named: returns the numbers of a record by the names that the tracker has for them.
            done: what the tracker has from earlier jobs; None: nothing.
            retry_seconds: between two tries.
        """
        self.name = name
        self._begin = begin
        self._named = named
        self._done = done
        self._retry_seconds = retry_seconds
        self._waiting: deque[Record | Image | Histogram] = deque()
        self._changed = threading.Condition()
        self._num_given_up = 0
        self._status: str | None = None
        self._final_text: str | None = None
        self._process = os.getpid()
        # What was handed over before this job is not handed over twice.
        self._known = {} if done is None else dict(done.steps)
        self._thread = threading.Thread(target=self._run, name=f"hpctrain-{name}", daemon=True)
        self._thread.start()

    def put(self, item: Record | Image | Histogram) -> None:
        """Have something handed over; returns at once."""
        stream, step = _place_of(item)
        if step <= self._known.get(stream, -1):
            return
        with self._changed:
            self._waiting.append(item)
            if len(self._waiting) > MAX_WAITING:
                self._waiting.popleft()
                self._num_given_up += 1
            self._changed.notify()

    def end(self, status: str) -> None:
        """Say that nothing more comes, so that the tracker ends as "success" or "failed"."""
        with self._changed:
            self._status = status
            self._changed.notify()

    def close(self, status: str, seconds: float = CLOSE_SECONDS) -> None:
        """Have the rest handed over, and wait for that, but not for ever.

        Args:
            status: "success" or "failed".
            seconds: to wait.
        """
        self.end(status)
        self._thread.join(seconds)
        with self._changed:
            lost = self._num_given_up + len(self._waiting)
            self._waiting.clear()
        if lost:
            _logger.warning(
                "%s: %s could not be handed over; metrics.jsonl has all that was measured",
                self.name,
                text.plural(lost, "record"),
            )
        elif self._thread.is_alive():
            _logger.warning("%s has not come to its end within %g s", self.name, seconds)
        elif self._final_text:
            _logger.info("%s: %s", self.name, self._final_text)

    def _run(self) -> None:
        tracker, failing = None, False
        while True:
            try:
                if tracker is None:
                    tracker = self._begin()
                    self._log_skipped()
                item = self._next()
                if item is None:
                    break
                self._hand(tracker, item)
                if os.getpid() != self._process:
                    os._exit(0)  # a child that the tracker has forked, and let come back
                with self._changed:
                    # Another may have been given up for want of room.
                    if self._waiting and self._waiting[0] is item:
                        self._waiting.popleft()
                failing = False
            except BaseException as error:  # noqa: BLE001 - a service's, sys.exit among them
                if os.getpid() != self._process:
                    os._exit(1)
                if not failing:
                    failing = True
                    _logger.warning(
                        "%s: %s: %s. Training goes on; what is measured is kept in memory and "
                        "handed over once that works",
                        self.name,
                        type(error).__name__,
                        text.printable(str(error)),
                    )
                if not self._pause():
                    return
        try:
            if callable(finalize := getattr(tracker, "finalize", None)):
                text_of_end = finalize(self._status)
                self._final_text = text_of_end if isinstance(text_of_end, str) else None
        except BaseException as error:  # noqa: BLE001 - a service's, of any kind
            _logger.warning("%s: its end failed: %s", self.name, text.printable(str(error)))

    def _log_skipped(self) -> None:
        if self._known:
            step = max(self._known.values())
            _logger.info("%s has the run up to step %s, and goes on there", self.name, f"{step:,}")

    def _next(self) -> Record | Image | Histogram | None:
        """Return what is to be handed over next, once there is something; None: that was all."""
        with self._changed:
            while not self._waiting:
                if self._status is not None:
                    return None
                self._changed.wait()
            return self._waiting[0]

    def _pause(self) -> bool:
        """Wait for another try; return whether there is to be one: the end of a job is the last."""
        with self._changed:
            if self._status is not None:
                return False
            self._changed.wait_for(lambda: self._status is not None, self._retry_seconds)
            return True

    def _hand(self, tracker: Tracker, item: Record | Image | Histogram) -> None:
        stream, step = _place_of(item)
        if self._done is not None and step > self._done.steps.get(stream, -1):
            self._done.note(
                stream, step
            )  # first: killed in between, it is missing, not twice there
        if isinstance(item, Image):
            if callable(hand := getattr(tracker, "log_image", None)):
                hand(item.name, [item.array()], step=item.step)
        elif isinstance(item, Histogram):
            if callable(hand := getattr(tracker, "log_histogram", None)):
                hand(item.name, item.counts, item.edges, step=item.step)
        else:
            tracker.log_metrics(self._named(item), step=step)


class Handed:
    """The steps up to which a tracker has everything, in a file of a few bytes.

    Raises:
        OSError: if it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self._descriptor = open_regular(path, os.O_RDWR | os.O_CREAT, follow_links=False)
        follow_folder(path)
        self.steps: dict[str, int] = {}
        with suppress(ValueError):
            known = parse_json(os.pread(self._descriptor, _STATE_BYTES, 0))
            if isinstance(known, dict):
                self.steps = {key: step for key, step in known.items() if type(step) is int}

    def note(self, stream: str, step: int) -> None:
        """Note a step of a stream; a process that is killed behind this has noted it."""
        self.steps[stream] = step
        content = json.dumps(self.steps).encode()
        if len(content) < _STATE_BYTES:
            os.pwrite(self._descriptor, content.ljust(_STATE_BYTES), 0)


def _place_of(item: Record | Image | Histogram) -> tuple[str, int]:
    """Return what an item is one of, and its step: each comes once a step."""
    if isinstance(item, Mapping):
        return f"{item['kind']} {item.get('split', '')}".strip(), item["step"]
    return item.name, item.step


def handing(
    run_folder: Path,
    name: str,
    make: Callable[[], Tracker],
    hyperparameters: Mapping[str, Any],
    *,
    is_new: bool,
) -> Handing | None:
    """Return what hands records to a tracker of the config; None: its folder cannot be made.

    Args:
        run_folder: of the run.
        name: of the tracker, that of its folder too.
        make: makes it.
        hyperparameters: the config, flat.
        is_new: whether this is the first job of a run.
    """
    folder = run_folder / FOLDER / name
    try:
        for each in (folder.parent, folder):
            each.mkdir(exist_ok=True)
            follow_folder(each)
        if is_new:
            for stale in ("id", "step"):
                (folder / stale).unlink(missing_ok=True)
        resumed = not create_file(folder / "id", f"{os.urandom(8).hex()}\n".encode())
        about = TrackedRun(
            name=run_folder.name,
            id=(folder / "id").read_text(encoding="ascii").strip(),
            folder=folder,
            resumed=resumed,
        )
        done = Handed(folder / "step")
    except (OSError, ValueError) as error:
        _logger.warning("%s is handed nothing: %s cannot be written: %s", name, folder, error)
        return None

    def begin() -> Tracker:
        tracker = make()
        if callable(hand := getattr(tracker, "begin_run", None)):
            hand(about)
        if callable(hand := getattr(tracker, "log_hyperparams", None)):
            hand(dict(hyperparameters))
        return tracker

    return Handing(name, begin, named=tagged, done=done)


def handing_to_object(tracker: Any, arguments: Mapping[str, Any]) -> Handing:
    """Return what hands records to a logger of a script's, which has it made itself.

    Hyperparameters are handed over at once, so that it has begun before its module logs by it.
    """
    name = type(tracker).__name__
    try:
        if callable(hand := getattr(tracker, "log_hyperparams", None)):
            hand(dict(arguments))
    except Exception as error:  # noqa: BLE001 - a service's, of any kind
        _logger.warning("%s takes no hyperparameters: %s", name, error)
    return Handing(name, lambda: tracker, named=own_names)


def own_names(record: Record) -> dict[str, float]:
    """Return the numbers of a record, by the names that a module logs them by."""
    flat = {**record, **record.get("logged", {})}
    return {
        name: value
        for name, value in flat.items()
        if name not in _OF_THE_LINE
        and isinstance(value, int | float)
        and not isinstance(value, bool)
    }


class WandB:
    """Weights & Biases: a run of theirs for a run of ours, whichever job it is.

    Args:
        project: that it belongs to.
        mode: "offline" writes files, to be sent later; None: as WANDB_MODE says, else offline.
        options: all others that `wandb.init` has.
    """

    def __init__(self, project: str = "hpctrain", mode: str | None = None, **options: Any) -> None:
        self._mode = mode or os.environ.get("WANDB_MODE") or "offline"
        self._options = {"project": project, **options}
        self._run: Any = None
        self._folder = Path()

    def begin_run(self, run: TrackedRun) -> None:
        """Begin, or go on with, a run."""
        import wandb

        self._folder = run.folder
        options = {"name": run.name, "id": run.id, **self._options}
        if self._mode != "offline":  # there it is `wandb sync` that joins what jobs have written
            options.setdefault("resume", "allow")
        settings = wandb.Settings(console="off", silent=True)
        self._run = wandb.init(
            dir=str(run.folder),
            mode=self._mode,  # type: ignore[arg-type]  # it says itself what it does not know
            settings=settings,
            **options,
        )

    def log_hyperparams(self, params: Mapping[str, Any]) -> None:
        """Take the config."""
        self._run.config.update(params, allow_val_change=True)

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Take the numbers of a line of metrics."""
        self._run.log(dict(metrics), step=step)

    def log_image(self, key: str, images: list[Any], step: int) -> None:
        """Take an image."""
        import wandb

        self._run.log({key: [wandb.Image(image) for image in images]}, step=step)

    def log_histogram(
        self, key: str, counts: Sequence[int], edges: Sequence[float], step: int
    ) -> None:
        """Take a histogram."""
        import numpy as np
        import wandb

        pair = np.asarray(counts), np.asarray(edges)
        self._run.log({key: wandb.Histogram(np_histogram=pair)}, step=step)

    def finalize(self, status: str) -> str | None:
        """End this job's part of it."""
        self._run.finish(exit_code=0 if status == "success" else 1)
        if self._mode != "offline":
            return None
        return f"wandb sync {self._folder}/wandb/offline-run-*   (where there is a network)"


class MLflow:
    """MLflow: a run of theirs for a run of ours, whichever job it is.

    Args:
        experiment: that it belongs to.
        tracking_uri: of a server, or a folder; None: as MLFLOW_TRACKING_URI says, else a folder of
            the run's.
    """

    def __init__(self, experiment: str = "hpctrain", tracking_uri: str | None = None) -> None:
        self._experiment = experiment
        self._uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
        self._is_local = self._uri is None
        self._client: Any = None
        self._run = ""

    def begin_run(self, run: TrackedRun) -> None:
        """Begin, or go on with, a run."""
        if self._is_local:
            self._uri = (run.folder / "mlruns").resolve().as_uri()
            # Newer releases would rather have a database, which parallel file systems cannot lock.
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        from mlflow.tracking import MlflowClient

        client = self._client = MlflowClient(tracking_uri=self._uri)
        known = client.get_experiment_by_name(self._experiment)
        experiment = known.experiment_id if known else client.create_experiment(self._experiment)
        tag = "hpctrain.run"
        found = client.search_runs([experiment], f"tags.`{tag}` = '{run.id}'", max_results=1)
        if found:
            self._run = found[0].info.run_id
            client.update_run(self._run, status="RUNNING")
        else:
            made = client.create_run(experiment, tags={tag: run.id}, run_name=run.name)
            self._run = made.info.run_id

    def log_hyperparams(self, params: Mapping[str, Any]) -> None:
        """Take the config. A value that has changed since an earlier job stays as it was there."""
        from mlflow.entities import Param

        known = self._client.get_run(self._run).data.params
        new = [Param(key, str(value)[:500]) for key, value in params.items() if key not in known]
        for start in range(0, len(new), 100):
            self._client.log_batch(self._run, params=new[start : start + 100])

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Take the numbers of a line of metrics."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        given = [Metric(key, value, now, step) for key, value in metrics.items()]
        self._client.log_batch(self._run, metrics=given)

    def log_image(self, key: str, images: list[Any], step: int) -> None:
        """Take an image."""
        for image in images:
            self._client.log_image(self._run, image, key=key, step=step)

    def log_histogram(
        self, key: str, counts: Sequence[int], edges: Sequence[float], step: int
    ) -> None:
        """Take a histogram, as a file: MLflow draws none."""
        table = {"step": step, "edges": list(edges), "counts": list(counts)}
        self._client.log_dict(self._run, table, f"histograms/{key}/{step:09d}.json")

    def finalize(self, status: str) -> str | None:
        """End this job's part of it."""
        self._client.set_terminated(self._run, "FINISHED" if status == "success" else "FAILED")
        return f"mlflow ui --backend-store-uri {self._uri}" if self._is_local else None
