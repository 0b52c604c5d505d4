"""One rank, as the watchdog of its node knows it."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from dataclasses import dataclass, field

from hpctrain.launch.watchdog.collectives import GroupPosition
from hpctrain.launch.watchdog.messages import Channel


@dataclass(slots=True)
class Rank:
    """One rank; without a channel it has not joined yet.

    Attributes:
        stacks: memory file that the rank writes its stacks to.
        has_shown: it has done so when it was asked.
        collectives: how far it has come in each process group; None until it has answered.
    """

    rank: int
    index: int
    channel: Channel | None = None
    pid: int = 0
    pidfd: int | None = None
    stacks: int = -1
    about: dict[str, object] = field(default_factory=dict)
    has_shown: bool = False
    collectives: tuple[GroupPosition, ...] | None = None
    left: bool = False
    gone: bool = False

    @property
    def alive(self) -> bool:
        return self.channel is not None and not (self.left or self.gone)

    def signal(self, number: int) -> None:
        """Send it a signal, if it is still there."""
        with suppress(OSError):
            if self.pidfd is not None:
                signal.pidfd_send_signal(self.pidfd, number)
            else:
                os.kill(self.pid, number)
