"""A verdict in words."""

from __future__ import annotations

from collections.abc import Sequence

from hpctrain.launch.watchdog.judge import (
    STOPPED,
    Death,
    NodeLost,
    Stall,
    Stand,
    Verdict,
    laggards,
)
from hpctrain.utils.text import first_lines, printable_lines

_SHOWN = 8
_SHOWN_STACKS = 2


def story(verdict: Verdict, stacks_folder: str | None = None) -> str:
    """Return what the user is told, as whole lines; what came over the network is escaped."""
    if isinstance(verdict, Death):
        text = _death(verdict)
    elif isinstance(verdict, NodeLost):
        text = _node_lost(verdict)
    else:
        text = _stall(verdict, stacks_folder)
    return printable_lines(text)


def _death(death: Death) -> str:
    if death.signal is not None:
        what = f"was killed by {death.signal}"
    elif death.exit_code is not None:
        what = f"ended with exit code {death.exit_code} and without a word"
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
    lines = [f"hpctrain: no rank has got on for {stall.seconds:g} s; the job ends."]
    if stall.left:
        behind = [stand for stand in stall.stands if stand.rank not in stall.left]
        running = _ranks([stand.rank for stand in behind])
        verb = "is" if len(behind) == 1 else "are"
        first = f"hpctrain: {_ranks(stall.left)} exited connect() while {running} {verb} still"
        lines = [f"{first} running: no progress for {stall.seconds:g} s (hang timeout)."]
    most = max((stand.progress for stand in stall.stands), default=0)
    lines += first_lines([_why(stand, stand.progress < most) for stand in behind], _SHOWN, "  ")
    if not behind and not stall.left:
        lines.append("  Do the ranks call collectives in different orders?")
    shown = {stand.stack: stand for stand in reversed(behind or stall.stands) if stand.stack}
    for stand in list(shown.values())[::-1][:_SHOWN_STACKS]:
        lines.append(f"Stack of rank {stand.rank}@{stand.host}, the innermost call first:")
        lines.append(stand.stack.rstrip())
    if stacks_folder is not None:
        lines.append(f"The stacks of all ranks are in {stacks_folder}.")
    return "\n".join(lines) + "\n"


def _why(stand: Stand, is_behind: bool) -> str:
    who = f"rank {stand.rank}@{stand.host}"
    if stand.state in STOPPED:
        return f"{who} is stopped (SIGSTOP, or a debugger holds it), after step {stand.step}"
    if stand.state == "D":
        return f"{who} waits for a disk or file system, after step {stand.step}"
    where = "behind" if is_behind else "elsewhere than"
    return f"{who} is {where} the others, after step {stand.step}"


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
