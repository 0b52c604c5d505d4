"""A verdict in words."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import PurePath

from hpctrain.launch.watchdog.collectives import HeldUp, held_up
from hpctrain.launch.watchdog.judge import laggards
from hpctrain.launch.watchdog.verdicts import (
    STOPPED,
    Death,
    LauncherGone,
    NodeLost,
    Stall,
    Stand,
    Verdict,
)
from hpctrain.utils.text import first_lines, printable_lines

_SHOWN = 8
_SHOWN_STACKS = 2

# As faulthandler writes a call.
_CALL = re.compile(r'^  File "(.*)", line (\d+) in (.*)$', re.MULTILINE)
# The standard library, and what is installed into it; hpctrain itself may be.
_INSTALLED = re.compile(r"/lib/python[\d.]+/(?!site-packages/hpctrain/)|^<")


def story(verdict: Verdict, stacks_folder: str | None = None) -> str:
    """Return what the user is told, as whole lines; what came over the network is escaped."""
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
