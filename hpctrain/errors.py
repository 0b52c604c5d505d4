"""Exit codes and the exceptions that carry them.

Every failure that a user can act on is an `HpctrainError`. Its class says whose turn it is
(the config, the launch, the data, ...), its message holds the fact, the place and the fix.
"""

from __future__ import annotations

import enum
import errno
import resource
from typing import ClassVar


class ExitCode(enum.IntEnum):
    """What a job script can branch on.

    Source: the values 64 to 78 are those of BSD's sysexits.h.
    """

    DONE = 0
    USAGE = 64
    DATA = 65
    LAUNCH = 69
    BUG = 70
    """A bug, or a training run that diverged."""
    CHECKPOINT_IO = 74
    STOPPED = 75
    """Stopped early with everything saved: submit again."""
    CONFIG = 78


def one_line(text: str) -> str:
    """Escape control characters, line feeds, bidi marks: what would garble a terminal or a log."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


_LIMIT = "ulimit -n"
_LONGEST_CHAIN = 20


def _open_files(error: BaseException) -> str:
    """Return what to do where a failure came of too many open files, wherever; else nothing.

    Shards, checkpoints and connections are files, and the system's own words name no limit.
    """
    cause: BaseException | None = error
    for _ in range(_LONGEST_CHAIN):
        if cause is None:
            return ""
        if isinstance(cause, OSError) and cause.errno == errno.EMFILE:
            break
        cause = cause.__cause__ or cause.__context__
    else:
        return ""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = "unlimited" if hard == resource.RLIM_INFINITY else str(hard)
    fix = (
        f"{_LIMIT} {most} in the job script"
        if soft != hard
        else f"the site can raise the hard one ({_LIMIT} in the job script goes no further), or "
        "start fewer ranks on a node"
    )
    return f"; open files: soft limit {soft}, hard limit {most}: {fix}"


class HpctrainError(Exception):
    """Root of all failures that hpctrain explains itself.

    Attributes:
        everywhere: True once all ranks hold this same error, so that one of them may report it for
            all and every rank may leave by the normal path. False means that only this rank
            knows, and that the others learn of by the end of the job.
        reported: True once it was reported to the user, on whatever rank.
    """

    exit_code: ClassVar[ExitCode] = ExitCode.BUG

    def __init__(self, message: str, *, everywhere: bool = False) -> None:
        super().__init__(message)
        self.everywhere = everywhere
        self.reported = False

    def __str__(self) -> str:
        text = "\n".join(map(str, self.args))
        return text + (_open_files(self) if _LIMIT not in text else "")


class UsageError(HpctrainError):
    """The command line is wrong."""

    exit_code = ExitCode.USAGE


class ConfigError(HpctrainError):
    """The config file, or a path that it names, is wrong."""

    exit_code = ExitCode.CONFIG


class LaunchError(HpctrainError):
    """The processes cannot form one world: launcher, MPI, network or device."""

    exit_code = ExitCode.LAUNCH


class DatasetError(HpctrainError):
    """The data are missing, damaged or not what the config says.

    Files are other people's, and so are the names in them and their own: what would garble a
    terminal, or begin a line that looks like ours, is escaped.

    Args:
        message: one line.
        lines: that follow it.
    """

    exit_code = ExitCode.DATA

    def __init__(self, message: str, *lines: str, everywhere: bool = False) -> None:
        super().__init__(message, everywhere=everywhere)
        self.args = tuple(one_line(each) for each in (message, *lines))


class CheckpointError(HpctrainError):
    """A checkpoint, or the run folder, cannot be read or written."""

    exit_code = ExitCode.CHECKPOINT_IO


class OutputError(HpctrainError):
    """What a command was asked for cannot be written to stdout."""

    exit_code = ExitCode.CHECKPOINT_IO


class TrainingError(HpctrainError):
    """Training itself failed: it diverged, or a model or task broke its contract."""

    exit_code = ExitCode.BUG
