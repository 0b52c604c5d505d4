"""`self.logger` of a module where the run writes its metrics itself.

Figures and histograms go to TensorBoard's files in the run's folder, numbers to its metrics, both
from rank 0; on other ranks, and in a dry run, calls do nothing. What only another logger has, such
as Weights & Biases', is refused in the dry run. Later it is reported once and left out: training
does not end for want of an image.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hpctrain.errors import ConfigError
from hpctrain.observe.metrics import TENSORBOARD_FOLDER, MetricsWriter
from hpctrain.training.modules.overrides import is_base

logger = logging.getLogger("hpctrain")

WRITER_METHODS = frozenset(
    {
        *("add_audio", "add_custom_scalars", "add_custom_scalars_marginchart", "add_embedding"),
        *("add_custom_scalars_multilinechart", "add_figure", "add_graph", "add_histogram"),
        *("add_histogram_raw", "add_hparams", "add_image", "add_image_with_boxes", "add_images"),
        *("add_mesh", "add_onnx_graph", "add_pr_curve", "add_pr_curve_raw", "add_scalar"),
        *("add_scalars", "add_tensor", "add_text", "add_video", "flush", "close", "get_logdir"),
    }
)
"""Methods of torch's SummaryWriter, known without TensorBoard being there."""


class MissingLoggerError(ConfigError, AttributeError):
    """Asked for before the first step, and not there: `hasattr` gets False for an answer."""


class _Nothing:
    """Takes any call, and does nothing."""

    def __call__(self, *_: Any, **__: Any) -> _Nothing:
        return self

    def __getattr__(self, name: str) -> _Nothing:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __getitem__(self, _: Any) -> _Nothing:
        return self

    def __setitem__(self, _: Any, __: Any) -> None:
        """Keep nothing."""


NOTHING = _Nothing()


class RunLogger:
    """A logger with the methods that all of Lightning's have, and TensorBoard's experiment.

    Attributes:
        name: of the folder of runs.
        version: of the run.
        save_dir: where runs of all names are.
        log_dir: the run's folder.
        experiment: takes what a SummaryWriter takes.
    """

    def __init__(self, folder: Path, *, writes: bool, trainer: Any) -> None:
        """Begin; nothing is written before the run has its metrics.

        Args:
            folder: of the run.
            writes: whether this rank does.
            trainer: knows the step, and whether what happens is a trial.
        """
        self.name, self.version = folder.parent.name, folder.name
        self.save_dir = self.root_dir = str(folder.parent)
        self.log_dir = str(folder)
        self._reported: set[str] = set()
        self._trainer = trainer
        self._writer: MetricsWriter | None = None
        self._early: list[Callable[[], Any]] = []
        self._writes = writes
        self.experiment = Experiment(
            folder / TENSORBOARD_FOLDER, self._act, self._refuse, self._write_event
        )

    def write_to(self, writer: MetricsWriter) -> None:
        """Write from now on, and what has come before; end with these metrics."""
        self._writer = writer
        writer.at_close(self.experiment.end)
        early, self._early = self._early, []
        for act in early:
            act()

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Write numbers as a line of the metrics, and for TensorBoard under their own names."""
        numbers = {name: float(value) for name, value in metrics.items()}
        for name, value in numbers.items():
            self.experiment.add_scalar(name, value, step)
        at = {} if step is None else {"at": step}
        record = {"kind": "logger", "step": self._trainer.global_step, **at, "logged": numbers}

        def write() -> None:
            assert self._writer is not None
            self._writer.write(record)

        self._act(write)

    def log_hyperparams(self, params: Any = None, *_: Any, **__: Any) -> None:
        """Do nothing: the run's config and its checkpoints have them."""

    def log_graph(self, model: Any, input_array: Any = None) -> None:
        """Draw the model for TensorBoard."""
        if input_array is None:
            input_array = getattr(model, "example_input_array", None)
        if input_array is not None:
            self.experiment.add_graph(model, input_array)

    def save(self) -> None:
        """Do nothing: every line is written when it comes."""

    def finalize(self, status: str = "success") -> None:
        """Do nothing: the run ends its files itself."""

    def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
        """Do nothing."""

    def __getitem__(self, index: int) -> RunLogger:
        return self  # as the only one of a collection

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return self._refuse(f"self.logger.{name}")

    def _write_event(self, event: Any) -> None:
        if self._writer is not None:
            self._writer.write_event(event)

    def _act(self, act: Callable[[], Any]) -> Any:
        """Do what writes something, now or once the run has its metrics; in a trial never."""
        if not self._writes or self._trainer.sanity_checking:
            return None
        if self._writer is None:
            self._early.append(act)
            return None
        return act()

    def _refuse(self, call: str) -> Any:
        """Refuse what is not there in a trial; later say so once, and take any call of it.

        Raises:
            ConfigError: in a trial.
        """
        text = (
            f"{call}: the logger of a run has no such thing; it writes metrics and TensorBoard's "
            "files. Give a script's Trainer the logger that has it, logger=..., or ask "
            "isinstance(self.logger, ...) before"
        )
        if self._trainer.sanity_checking:
            raise MissingLoggerError(text)
        if self._writes and call not in self._reported:
            self._reported.add(call)
            logger.warning("%s. It is left out", text)
        return NOTHING


class Experiment:
    """Hands the calls of a SummaryWriter on to one that writes to the run's folder."""

    def __init__(
        self,
        folder: Path,
        act: Callable[[Callable[[], Any]], Any],
        refuse: Callable[[str], Any],
        write: Callable[[Any], None],
    ) -> None:
        self.log_dir = str(folder)
        self._write = write
        self._act = act
        self._refuse = refuse
        self._opened: Any = None

    def end(self) -> None:
        """Write what still waits."""
        if self._opened is not None and self._opened is not NOTHING:
            self._opened.close()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        if name not in WRITER_METHODS:
            return self._refuse(f"self.logger.experiment.{name}")
        return functools.partial(self._call, name)

    def _call(self, name: str, *args: Any, **keywords: Any) -> Any:
        if name == "get_logdir":
            return self.log_dir
        return self._act(lambda: getattr(self._writer(), name)(*args, **keywords))

    def _writer(self) -> Any:
        if self._opened is None:
            self._opened = self._open()
        return self._opened

    def _open(self) -> Any:
        try:
            return _summary_writer(self.log_dir, self._write)
        except ImportError:
            logger.warning(
                "self.logger.experiment: nothing is written, since TensorBoard is not installed "
                "(pip install tensorboard)"
            )
            return NOTHING


class _Events:
    """Takes events in the place of a file of their own."""

    def __init__(self, folder: str, write: Callable[[Any], None]) -> None:
        self._folder = folder
        self.add_event = write

    def get_logdir(self) -> str:
        return self._folder

    def reopen(self) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


def _summary_writer(folder: str, write: Callable[[Any], None]) -> Any:
    """Return a SummaryWriter whose events go to the event file of the run.

    Of several files in a folder TensorBoard reads on in the newest alone: with one of its own it
    would hide what the run writes from then on. And a restart drops the steps that come again.

    Raises:
        ImportError: without TensorBoard.
    """
    from torch.utils.tensorboard import FileWriter, SummaryWriter

    class RunWriter(SummaryWriter):
        def _get_file_writer(self) -> Any:
            if self.file_writer is None:
                writer: Any = FileWriter.__new__(FileWriter)
                writer.event_writer = _Events(folder, write)
                vars(self).update(file_writer=writer, all_writers={folder: writer})
            return self.file_writer

    return RunWriter(folder)


def foreign_calls(holders: Sequence[Any]) -> list[str]:
    """Return what a module and callbacks call of a logger that only another one has, by place.

    Found in their code, so that it is known before an hour of training; it may never be reached.

    Args:
        holders: the module first, whose `self.logger` is the run's.
    """
    found: dict[str, None] = {}
    for holder in holders:
        kinds = [kind for kind in type(holder).__mro__ if not is_base(kind)]
        functions = {name: item for kind in reversed(kinds) for name, item in vars(kind).items()}
        for item in functions.values():
            code: Any = getattr(inspect.unwrap(item) if callable(item) else None, "__code__", None)
            for call, line in [] if code is None else _calls(code):
                found[f"{call} ({code.co_filename}, line {line})"] = None
    return list(found)


def _calls(code: Any) -> list[tuple[str, int]]:
    """Return the chains `.logger.experiment.NAME` of some code that nothing here answers to."""
    import dis

    if "experiment" not in code.co_names or _asks(code):
        return []
    found, before = [], ["", ""]
    for step in dis.get_instructions(code):
        if step.opname not in ("LOAD_ATTR", "LOAD_METHOD"):
            before = ["", ""]
            continue
        name = str(step.argval)
        if before == ["logger", "experiment"] and name not in {*WRITER_METHODS, "log_dir"}:
            line = getattr(getattr(step, "positions", None), "lineno", None)
            found.append((f"self.logger.experiment.{name}", line or code.co_firstlineno))
        before = [before[1], name]
    return found


def _asks(code: Any) -> bool:
    """Tell whether code looks first at what logger it has."""
    return bool({"isinstance", "hasattr", "type"} & {*code.co_names})
