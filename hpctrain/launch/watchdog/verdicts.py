"""Facts of the watchdogs: what they see of ranks, what is judged of it, and its words."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath

from hpctrain.errors import ExitCode
from hpctrain.launch.watchdog.evidence import GroupPosition, HeldUp, held_up
from hpctrain.utils.text import first_lines, printable_lines

# States of a process that gets no time: SIGSTOP, or a debugger. Source: man 5 proc_pid_stat.
STOPPED = ("T", "t")

_SHOWN = 8
_SHOWN_STACKS = 2

# As faulthandler writes a call.
_CALL = re.compile(r'^  File "(.*)", line (\d+) in (.*)$', re.MULTILINE)
# The standard library, and what is installed into it; hpctrain itself may be.
_INSTALLED = re.compile(r"/lib/python[\d.]+/(?!site-packages/hpctrain/)|^<")


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
    """A node whose watchdog has gone silent, or never link."""

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


def story(verdict: Verdict, stacks_folder: str | None = None) -> str:
    """Return what the user gets to read, as whole lines; what came over the network is escaped."""
    if isinstance(verdict, Death):
        text = _death(verdict)
    elif isinstance(verdict, NodeLost):
        text = _node_lost(verdict)
    elif isinstance(verdict, LauncherGone):
        text = _launcher_gone(verdict)
    else:
        text = _stall(verdict, stacks_folder)
    return printable_lines(text)


def _launcher_gone(gone: LauncherGone) -> str:
    what = f"was killed by {gone.signal}" if gone.signal else "has ended"
    running = "it was running" if len(gone.ranks) == 1 else "they were running"
    return (
        f"hpctrain: {gone.name} (process {gone.pid} on {gone.host}), which had started "
        f"{_ranks(gone.ranks)}, {what} while {running}; "
        f"{'all ranks are asked to stop (SIGTERM)' if gone.is_front_end else 'the job ends'}.\n"
    )


def _death(death: Death) -> str:
    if death.signal is not None:
        what = f"was killed by {death.signal}"
    elif death.exit_code is not None:
        what = f"ended with exit code {death.exit_code} and without an error message"
    else:
        what = "was killed"
    text = f"hpctrain: rank {death.rank}@{death.host} {what}; the job ends."
    if death.oom_kills:
        text += (
            " The kernel killed for lack of memory there: start fewer ranks per node, ask for "
            "more memory, or lower data.micro_batch_size."
        )
    return text + "\n"


def _node_lost(lost: NodeLost) -> str:
    return (
        f"hpctrain: node {lost.group.host} with {_ranks(lost.group.ranks)} is gone: it is down or "
        "cannot be reached, or its processes were killed; the job ends.\n"
    )


def _stall(stall: Stall, stacks_folder: str | None) -> str:
    behind = laggards(stall.stands)
    lines = [f"hpctrain: no progress for {stall.seconds:g} s (hang timeout); the job ends."]
    if stall.left:
        behind = [stand for stand in stall.stands if stand.rank not in stall.left]
        running = _ranks([stand.rank for stand in behind])
        verb = "is" if len(behind) == 1 else "are"
        first = f"hpctrain: {_ranks(stall.left)} exited connect() while {running} {verb} still"
        lines = [f"{first} running: no progress for {stall.seconds:g} s (hang timeout)."]
    held = held_up({stand.rank: stand.collectives for stand in stall.stands if stand.collectives})
    if held is not None:
        lines.append(f"  {_held_up(held)}")
        if not stall.left:
            behind = [stand for stand in stall.stands if stand.rank in held.absent] or behind
    most = max((stand.progress for stand in stall.stands), default=0)
    lines += first_lines([_why(stand, stand.progress < most) for stand in behind], _SHOWN, "  ")
    if not behind and not stall.left and held is None:
        lines.append("  Do the ranks call collectives in different orders?")
    shown = {stand.stack: stand for stand in reversed(behind or stall.stands) if stand.stack}
    for stand in list(shown.values())[::-1][:_SHOWN_STACKS]:
        lines.append(f"Stack of rank {stand.rank}@{stand.host}, the innermost call first:")
        lines.append(stand.stack.rstrip())
    if stacks_folder is not None:
        lines.append(f"The stacks of all ranks are in {stacks_folder}.")
    return "\n".join(lines) + "\n"


def _held_up(held: HeldUp) -> str:
    """Return which collective ranks wait in, and who is not in it."""
    where = [
        f"{_ranks(ranks)} {'waits' if len(ranks) == 1 else 'wait'} in {name}"
        for name, ranks in held.waiting.items()
    ]
    text = f"{', '.join(where)} (number {held.number} of its process group)"
    if held.absent:
        have = "has" if len(held.absent) == 1 else "have"
        text += f"; {_ranks(held.absent)} {have} not entered it"
    elif len(held.waiting) > 1:
        text += "; they call collectives in different orders"
    else:
        text += "; all have entered it: the network does not deliver"
    return text


def _why(stand: Stand, is_behind: bool) -> str:
    who = f"rank {stand.rank}@{stand.host}"
    place = place_of(stand.stack)
    after = f"after step {stand.step}" + (f", in {place}" if place else "")
    if stand.state in STOPPED:
        return f"{who} is stopped (SIGSTOP, or a debugger holds it), {after}"
    if stand.state == "D":
        return f"{who} waits for a disk or file system, {after}"
    where = "behind" if is_behind else "elsewhere than"
    return f"{who} is {where} the others, {after}"


def place_of(stack: str) -> str:
    """Return where a stack stands: its innermost call outside of installed packages."""
    calls = _CALL.findall(stack)
    own = [call for call in calls if _INSTALLED.search(call[0]) is None]
    for path, line, name in (own or calls)[:1]:
        return f"{name} ({PurePath(path).name}:{line})"
    return ""


def _ranks(ranks: Sequence[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    if ranks[-1] - ranks[0] == len(ranks) - 1:
        return f"ranks {ranks[0]} to {ranks[-1]}"
    return "ranks " + ", ".join(map(str, ranks))


def main_stack(dump: str) -> str:
    """Return the stack of the main thread from what faulthandler wrote of all threads."""
    blocks = dump.strip().split("\n\n")
    current = [block for block in blocks if block.startswith("Current thread")]
    _, _, stack = (current or blocks[-1:])[0].partition("\n")
    return stack


def laggards(stands: Sequence[Stand]) -> list[Stand]:
    """Return the ranks that the others wait for; none where nothing distinguishes them.

    Stopped processes, whatever they did before; else those with the fewest heartbeats; else
    those that are somewhere else in the program than most.
    """
    for behind in (
        [stand for stand in stands if stand.state in STOPPED],
        _fewest_signs(stands),
        _elsewhere(stands),
    ):
        if 0 < len(behind) < len(stands):
            return behind
    return []


def _fewest_signs(stands: Sequence[Stand]) -> list[Stand]:
    fewest = min((stand.progress for stand in stands), default=0)
    return [stand for stand in stands if stand.progress == fewest]


def _elsewhere(stands: Sequence[Stand]) -> list[Stand]:
    ((usual, count),) = Counter(stand.stack for stand in stands).most_common(1) or [("", 0)]
    return [stand for stand in stands if stand.stack != usual] if 2 * count > len(stands) else []
