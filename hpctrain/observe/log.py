"""The log: one rank reports, to stderr and to log.txt; what others warn of is in ranks.log.

Warnings of libraries come through here as well, so that each is logged once, on one line, with its
origin. HPCTRAIN_LOG asks for more: "debug", "json", "native", or several with commas.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TextIO

from hpctrain.errors import CheckpointError, ConfigError
from hpctrain.observe import native
from hpctrain.observe.progress import AboveBar
from hpctrain.utils.files import AppendedFile, open_regular
from hpctrain.utils.permissions import explained, follow_folder
from hpctrain.utils.text import printable, printable_lines

LOG_FILE = "log.txt"

RANKS_FILE = "ranks.log"
"""What ranks other than the speaking one warn of, each line with its rank and host."""

JSON_FILE = "log.jsonl"
"""log.txt as a JSON object a line, where HPCTRAIN_LOG asks for it."""

VARIABLE = "HPCTRAIN_LOG"

WORDS = ("debug", "json", native.WORD)
"""What that variable may hold."""

MOST_LINES = 200
"""Of a rank in ranks.log, and a job: ranks that all have the same trouble are to fill no disk."""

MEANINGLESS_WARNINGS: tuple[tuple[str, type[Warning]], ...] = (
    # torch 2.13 on DistributedDataParallel(broadcast_buffers=...). The name that it asks for
    # instead does not exist in the older versions that hpctrain runs on as well.
    (r"`broadcast_buffers` is deprecated", FutureWarning),
)
"""Start of the message, as a regular expression, and category of what a user can do nothing about.

Whoever asks Python for warnings, by -W or PYTHONWARNINGS, sees these as well.
"""

_LOGGED_PER_PLACE = 3
"""Warnings of a line of code that differ each time, as by a number in the text, at most."""

_logger = logging.getLogger(__name__)
_warnings_logger = logging.getLogger("hpctrain.warnings")


@contextmanager
def start(
    run_folder: Path | None,
    is_reporter: bool,
    *,
    stream: TextIO | None = None,
    who: str | None = None,
) -> Iterator[None]:
    """Set up logging for a job; handlers, levels and warning filters are restored at the end.

    What libraries and the user's own modules log goes the same way, from warnings upwards.

    Args:
        run_folder: where log.txt is appended to; None: no file.
        is_reporter: whether this is the one rank that writes.
        stream: the console; None is stderr.
        who: this rank and its host, for ranks.log; None: a rank that does not report is silent.

    Raises:
        ConfigError: if HPCTRAIN_LOG asks for what there is not.
        CheckpointError: if log.txt cannot be opened.
    """
    asked = _asked()
    with ExitStack() as stack:
        if run_folder is not None and who is not None and native.is_wanted(asked, os.environ):
            stack.enter_context(native.tagged(run_folder / RANKS_FILE, who))
        stack.enter_context(_started(asked, run_folder, is_reporter, stream, who))
        yield


@contextmanager
def _started(
    asked: Collection[str],
    run_folder: Path | None,
    is_reporter: bool,
    stream: TextIO | None,
    who: str | None,
) -> Iterator[None]:
    """Have Python's loggers and warnings write where they are to, see `start`."""
    level = logging.DEBUG if "debug" in asked else logging.INFO
    handlers: list[logging.Handler] = []
    if not is_reporter:
        # Without any handler, logging would write warnings to stderr on its own.
        handlers.append(logging.NullHandler())
        if run_folder is not None and who is not None:
            least = logging.DEBUG if "debug" in asked else logging.WARNING
            handlers.append(RanksHandler(run_folder / RANKS_FILE, who, least))
    else:
        handlers.append(_console_handler(sys.stderr if stream is None else stream))
        if run_folder is not None:
            handlers.append(_file_handler(run_folder / LOG_FILE, FileFormatter()))
            if "json" in asked:
                handlers.append(_file_handler(run_folder / JSON_FILE, JsonFormatter(who)))
    told_here = is_reporter or len(handlers) > 1
    with ExitStack() as stack:
        for handler in handlers:
            stack.callback(handler.close)
        stack.enter_context(_torch_loggers_propagate())
        stack.enter_context(_attached(handlers, level))
        stack.enter_context(_warnings_to(_report_warning_once() if told_here else _drop_warning))
        yield


def _asked() -> set[str]:
    """Return what HPCTRAIN_LOG asks for.

    Raises:
        ConfigError: if that is something else.
    """
    words = {word.strip() for word in os.environ.get(VARIABLE, "").lower().split(",")} - {""}
    if unknown := sorted(words - set(WORDS)):
        raise ConfigError(
            f'{VARIABLE} = "{printable(os.environ[VARIABLE])}": {printable(unknown[0])!r} is none '
            f"of {', '.join(WORDS)}; several with commas"
        )
    return words


class ConsoleFormatter(logging.Formatter):
    """Information as it is; anything more serious with its level, and with a foreign origin."""

    def format(self, record: logging.LogRecord) -> str:
        message = super().format(record)
        if record.name.split(".")[0] == "hpctrain":  # names from files may be in it
            message = printable_lines(message)
        if record.levelno < logging.WARNING:
            return message
        origin = "" if record.name.split(".")[0] == "hpctrain" else f"{record.name}: "
        return f"{record.levelname.lower()}: {origin}{message}"


class FileFormatter(ConsoleFormatter):
    """The same with local time, on every line of the message, so that lines can be sorted out."""

    default_time_format = "%Y-%m-%d %H:%M:%S"
    default_msec_format = None

    def format(self, record: logging.LogRecord) -> str:
        stamp = self.formatTime(record)
        return "\n".join(f"{stamp}  {line}".rstrip() for line in super().format(record).split("\n"))


class JsonFormatter(logging.Formatter):
    """A JSON object a line: "time", "level", "logger", "rank", "message"."""

    def __init__(self, who: str | None) -> None:
        super().__init__()
        self._who = who

    def format(self, record: logging.LogRecord) -> str:
        facts = {
            "time": round(record.created, 3),
            "level": record.levelname.lower(),
            "logger": record.name,
            "rank": self._who,
            "message": super().format(record),
        }
        return json.dumps({key: value for key, value in facts.items() if value is not None})


class RanksHandler(logging.Handler):
    """ranks.log, which many processes append to: a message at once, or not at all.

    It is opened for the first message. What cannot be written is lost: the rank that reports has a
    log of its own.
    """

    def __init__(self, path: Path, who: str, level: int) -> None:
        """Prepare.

        Args:
            path: of the file.
            who: the rank and its host.
            level: from which on messages are written.
        """
        super().__init__(level)
        self._path = path
        self._who = who
        self._descriptor: int | None = None
        self._num_left = MOST_LINES
        self.setFormatter(ConsoleFormatter())

    def emit(self, record: logging.LogRecord) -> None:
        """Append a message, every line of it with the rank."""
        if self._num_left < 0:
            return
        stamp = time.strftime(FileFormatter.default_time_format, time.localtime(record.created))
        lines = self.format(record).splitlines()[: self._num_left + 1]
        if len(lines) > self._num_left:
            lines = [*lines[: self._num_left], f"no more than {MOST_LINES} lines of a rank"]
            self._num_left = -1
        self._num_left -= len(lines)
        text = "".join(f"{stamp}  {self._who}: {line}\n" for line in lines)
        with suppress(OSError):
            if self._descriptor is None:
                flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
                self._descriptor = open_regular(self._path, flags, follow_links=False)
                follow_folder(self._path)
            os.write(self._descriptor, text.encode(errors="backslashreplace"))

    def close(self) -> None:
        descriptor, self._descriptor, self._num_left = self._descriptor, None, -1
        if descriptor is not None:
            os.close(descriptor)
        super().close()


class LogFile:
    """A text stream on a file that never holds half a message, nor keeps any in memory."""

    def __init__(self, path: Path) -> None:
        self._file = AppendedFile(path)

    def write(self, text: str) -> None:
        """Append a whole message, line feeds included."""
        self._file.append(text.encode(errors="backslashreplace"))

    def flush(self) -> None:
        """Do nothing: what was written is with the operating system."""

    def close(self) -> None:
        self._file.close()


class RunLogHandler(logging.StreamHandler):  # type: ignore[type-arg]  # Python 3.10 has none
    """log.txt. A disk that is full costs lines of the log, not the training.

    Raises:
        OSError: if the file cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(LogFile(path))
        self._path = path
        self._complained = False

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's own name
        """Say once that the log has gaps; anything but I/O is logging's own matter."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self._complained:
            self._complained = True  # before the warning, which comes through here as well
            _logger.warning("%s has gaps, it cannot be written: %s", self._path, error.strerror)

    def close(self) -> None:
        with suppress(OSError):
            self.stream.close()
        super().close()


def _console_handler(stream: TextIO) -> logging.Handler:
    handler = logging.StreamHandler(AboveBar(stream))
    handler.setFormatter(ConsoleFormatter())
    return handler


def _file_handler(path: Path, formatter: logging.Formatter) -> logging.Handler:
    try:
        handler = RunLogHandler(path)
    except OSError as error:
        raise CheckpointError(
            f"cannot write the log {path}: {explained(error, path)}\n"
            "  fix: make the run folder writable, or choose another by run.directory"
        ) from error
    handler.setFormatter(formatter)
    return handler


@contextmanager
def _attached(handlers: list[logging.Handler], wanted: int) -> Iterator[None]:
    """Let the root logger have these handlers, and hpctrain's loggers tell what is asked for."""
    root, package = logging.getLogger(), logging.getLogger("hpctrain")
    level = package.level
    package.setLevel(wanted)
    for handler in handlers:
        root.addHandler(handler)
    try:
        yield
    finally:
        for handler in handlers:
            root.removeHandler(handler)
        package.setLevel(level)


@contextmanager
def _torch_loggers_propagate() -> Iterator[None]:
    """Take from torch's loggers the handlers by which each rank writes to stderr on its own.

    Left alone where the user has asked for torch's logs.
    """
    moved: list[tuple[logging.Logger, list[logging.Handler]]] = []
    if "TORCH_LOGS" not in os.environ:
        for name, logger in list(logging.root.manager.loggerDict.items()):
            if name.split(".")[0] != "torch" or not isinstance(logger, logging.Logger):
                continue
            if logger.handlers and not logger.propagate:
                moved.append((logger, list(logger.handlers)))
                logger.handlers.clear()
                logger.propagate = True
    try:
        yield
    finally:
        for logger, handlers in moved:
            logger.handlers[:] = handlers
            logger.propagate = False


Show = Callable[..., None]
"""What Python calls to show a warning: (message, category, filename, lineno, ...)."""


@contextmanager
def _warnings_to(show: Show) -> Iterator[None]:
    with warnings.catch_warnings():
        if not sys.warnoptions:
            for pattern, category in MEANINGLESS_WARNINGS:
                warnings.filterwarnings("ignore", message=pattern, category=category)
        warnings.showwarning = show
        yield


def _report_warning_once() -> Show:
    """Return a function that logs a warning on one line, unless it has been logged before."""
    texts: set[str] = set()
    places: Counter[tuple[str, int]] = Counter()

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        *_: object,
        **__: object,
    ) -> None:
        text = " ".join(str(message).split())
        places[filename, lineno] += 1
        if text in texts or places[filename, lineno] > _LOGGED_PER_PLACE:
            return
        texts.add(text)
        origin = f"{short_path(filename)}:{lineno}"
        _warnings_logger.warning("%s (%s, %s)", text, category.__name__, origin)

    return show


def _drop_warning(*arguments: object, **keywords: object) -> None:
    """Show nothing: another rank reports it."""


def short_path(filename: str) -> str:
    """Return a source file as its package knows it, or relative to the current directory."""
    path = Path(filename)
    for marker in ("site-packages", "dist-packages"):
        if marker in path.parts:
            last = len(path.parts) - 1 - path.parts[::-1].index(marker)
            return str(Path(*path.parts[last + 1 :]))
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return filename
