"""What the watchdogs see of ranks, what is judged of it, and what is to be done: facts alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from hpctrain.errors import ExitCode
from hpctrain.launch.watchdog.collectives import GroupPosition

# States of a process that gets no time: SIGSTOP, or a debugger. Source: man 5 proc_pid_stat.
STOPPED = ("T", "t")


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """The ranks of one watchdog; keyed by the lowest of them."""

    host: str
    ranks: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Death:
    """A rank that has ended without an error message.

    Attributes:
        signal: that killed it, as a name; None if it ended by itself or nobody knows.
        exit_code: where it ended by itself.
        oom_kills: processes that the kernel has killed for memory on that node in this job.
        about: what the rank had said of itself: device, versions.
    """

    rank: int
    host: str
    signal: str | None = None
    signal_number: int | None = None
    exit_code: int | None = None
    oom_kills: int = 0
    step: int = 0
    about: Mapping[str, object] = field(default_factory=dict)

    @property
    def code(self) -> int:
        if self.exit_code is not None:
            return self.exit_code or ExitCode.BUG
        return 128 + (9 if self.signal_number is None else self.signal_number)


@dataclass(frozen=True, slots=True)
class NodeLost:
    """A node whose watchdog has gone silent, or never spoke."""

    group: Group
    code: int = ExitCode.LAUNCH


@dataclass(frozen=True, slots=True, kw_only=True)
class LauncherGone:
    """A process of the launcher that has ended before the ranks that it had started.

    Attributes:
        signal: that killed it, as a name; None if it ended by itself or nobody knows.
        is_front_end: what has started the ranks is still there: they can be asked to stop, and
            their output arrives. So it is with Intel MPI's mpirun, a script that TERM just ends.
    """

    host: str
    ranks: tuple[int, ...]
    name: str
    pid: int
    signal: str | None = None
    is_front_end: bool = False
    code: int = ExitCode.LAUNCH


@dataclass(frozen=True, slots=True, kw_only=True)
class Stand:
    """Where a rank stands when nobody makes progress.

    Attributes:
        state: letter of its process.
        stack: of its main thread; "" if it did not answer.
        collectives: how far it has come in each process group; none if it did not answer.
    """

    rank: int
    host: str
    progress: int
    step: int
    state: str
    stack: str
    collectives: tuple[GroupPosition, ...] = ()


@dataclass(frozen=True, slots=True)
class Stall:
    """All ranks alive, and none makes progress.

    Attributes:
        left: ranks that have left the job's body, and wait for the others to do so.
    """

    seconds: float
    stands: tuple[Stand, ...]
    left: tuple[int, ...] = ()
    code: int = ExitCode.BUG


Verdict = Death | NodeLost | LauncherGone | Stall


@dataclass(frozen=True, slots=True)
class Reply:
    """Answer a rank that wants to tell how it failed."""

    rank: int
    may_speak: bool


@dataclass(frozen=True, slots=True)
class Tell:
    """Tell the user, and write the reports."""

    verdict: Verdict


@dataclass(frozen=True, slots=True)
class AskToStop:
    """Have every rank save and end, as a scheduler would, and tell why."""

    reason: LauncherGone


@dataclass(frozen=True, slots=True)
class AskStacks:
    """Have every rank say where it stands."""


@dataclass(frozen=True, slots=True)
class End:
    """End all ranks with an exit code."""

    code: int


Action = Reply | Tell | AskToStop | AskStacks | End
