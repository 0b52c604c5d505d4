"""What happened, whose word is heard, and when the job ends: decided once, for all ranks.

The coordinator's part, as a state machine without sockets, processes or clocks of its own: every
event comes with the time, and what to do comes back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from hpctrain.launch.watchdog.verdicts import (
    Action,
    AskStacks,
    AskToStop,
    Death,
    End,
    Group,
    LauncherGone,
    NodeLost,
    Reply,
    Stall,
    Stand,
    Tell,
    Verdict,
)

# A collective that fails on one rank is mostly the echo of another rank's end, which gets here at
# about the same time.
_ECHO_SECONDS = 0.5
# Launchers whose own process was killed mostly end the ranks of the other nodes, in their own time.
_LAUNCHER_SECONDS = 2.0
# The rank that fails reports it and ends the job itself; after this the coordinator does.
_SPEECH_SECONDS = 5.0
# Stopped processes answer nothing; the others dump their stacks in milliseconds.
_STACKS_SECONDS = 2.0


class Judge:
    """Turns what the watchdogs see into one verdict."""

    def __init__(
        self,
        groups: Mapping[int, Group],
        *,
        hang_timeout_seconds: float,
        first_step_timeout_seconds: float,
    ) -> None:
        self._groups = groups
        self._world_size = sum(len(group.ranks) for group in groups.values())
        self._hang_timeout_seconds = hang_timeout_seconds
        self._first_step_timeout_seconds = first_step_timeout_seconds
        self._settled = False
        self._speaker: tuple[int, int, float] | None = None  # rank, exit code, since
        self._echoes: dict[int, tuple[int, float]] = {}  # rank to exit code, since
        self._lost: tuple[int, float] | None = None
        self._launcher_gone: tuple[LauncherGone, float] | None = None
        self._has_asked_to_stop = False
        self._moved_at: float | None = None  # None: no rank has ever ticked
        self._long_phase: dict[int, bool] = {}
        self._outside: set[int] = set()
        self._leaving: set[int] = set()
        self._left_at: float | None = None  # the first of them
        self._asked_at: float | None = None
        self._stands: dict[int, Stand] = {}

    def failing(self, rank: int, code: int, may_be_echo: bool, now: float) -> Sequence[Action]:
        """Take note of a rank that fails and asks to report it."""
        if self._settled:
            return [Reply(rank, may_speak=False)]
        if self._launcher_gone is not None and not self._has_asked_to_stop:
            # Its output and its MPI have lost their other end.
            return [Reply(rank, may_speak=False), *self._condemn(self._launcher_gone[0])]
        if may_be_echo:
            self._echoes[rank] = (code, now)
            return []
        return self._give_floor(rank, code, now)

    def died(self, death: Death) -> Sequence[Action]:
        """Take note of a rank that ended without taking leave."""
        if self._speaker is not None and self._speaker[0] == death.rank:
            return [End(self._speaker[1])]
        if self._settled:
            return []
        if self._launcher_gone is None:
            return self._condemn(death)
        gone = self._launcher_gone[0]
        if not self._has_asked_to_stop:
            return self._condemn(gone)
        if death.signal != "SIGTERM":
            return self._condemn(death)
        # It was asked to stop, and does not know how to; that has been reported.
        self._settled = True
        return [*self._silence_echoes(), End(gone.code)]

    def launcher_gone(self, gone: LauncherGone, now: float) -> None:
        """Take note of a process of the launcher that has ended before its ranks."""
        if self._launcher_gone is None:
            self._launcher_gone = (gone, now)
            return
        known, since = self._launcher_gone
        if known.is_front_end == gone.is_front_end:
            return
        # What has started the ranks follows its front end; a front end that ends by itself after it
        # has given up for a daemon that was killed, as Open MPI's does.
        front_end, daemon = (known, gone) if known.is_front_end else (gone, known)
        was_first_to_go = daemon is known and daemon.signal and not front_end.signal
        cause = daemon if was_first_to_go else front_end
        self._launcher_gone = (replace(cause, is_front_end=False), since)
        self._has_asked_to_stop = False

    def lost(self, leader: int, now: float) -> None:
        """Take note of a node that cannot be heard any more."""
        if self._lost is None:
            self._lost = (leader, now)

    def moved(self, leader: int, long_phase: bool, now: float) -> None:
        """Take note of heartbeats from the ranks of a group."""
        self._moved_at = now
        self._long_phase[leader] = long_phase

    def leaving(self, rank: int, now: float) -> None:
        """Take note of a rank that has left the job's body: the others are to follow."""
        self._leaving.add(rank)
        if self._left_at is None:
            self._left_at = now

    def outside(self, rank: int) -> None:
        """Take note of a rank that goes on in its program, and waits for nobody there."""
        self._outside.add(rank)
        self._back(rank)

    def entering(
        self, rank: int, hang_timeout_seconds: float, first_step_timeout_seconds: float
    ) -> None:
        """Take note of a rank that enters a job's body; rank 0's limits hold in there."""
        self._outside.discard(rank)
        self._back(rank)
        self._moved_at = None
        if rank == 0:
            self._hang_timeout_seconds = hang_timeout_seconds
            self._first_step_timeout_seconds = first_step_timeout_seconds

    def _back(self, rank: int) -> None:
        self._leaving.discard(rank)
        if not self._leaving:
            self._left_at = None

    def stands(self, stands: Sequence[Stand]) -> Sequence[Action]:
        """Take note of where ranks stand; the verdict follows once all have said it."""
        self._stands.update((stand.rank, stand) for stand in stands)
        if len(self._stands) == self._world_size:
            return self._stall()
        return []

    def look(self, now: float) -> Sequence[Action]:
        """Do what is due by the clock."""
        if self._speaker is not None:
            _, code, since = self._speaker
            return [End(code)] if now - since >= _SPEECH_SECONDS else []
        if self._settled:
            return []
        for rank, (code, since) in self._echoes.items():
            if now - since >= _ECHO_SECONDS:
                return self._give_floor(rank, code, now)
        if self._launcher_gone is not None and not self._has_asked_to_stop:
            return self._look_at_launcher(*self._launcher_gone, now)
        # The launcher may be clearing up after a rank whose end is still on its way here.
        if self._lost is not None and now - self._lost[1] >= _ECHO_SECONDS:
            return self._condemn(NodeLost(self._groups[self._lost[0]]))
        return self._look_for_stall(now)

    def due_seconds(self, now: float) -> float:
        """Return how long it may take until `look` is next worth calling."""
        launcher = self._launcher_gone is not None and not self._has_asked_to_stop
        waiting = self._echoes or self._lost or launcher or self._asked_at is not None
        if waiting and not self._settled:
            return 0.1
        since, limit = self._standing_still()
        return 1.0 if since is None else min(1.0, max(0.05, since + limit - now))

    def _look_at_launcher(self, gone: LauncherGone, since: float, now: float) -> Sequence[Action]:
        if now - since < _LAUNCHER_SECONDS:
            return []
        if not gone.is_front_end:
            return self._condemn(gone)
        self._has_asked_to_stop = True
        return [AskToStop(gone)]

    def _standing_still(self) -> tuple[float | None, float]:
        """Return since when there is no progress, None if there never was any, and the limit."""
        if self._left_at is not None and self._has_left_behind:
            # A loop that gives no heartbeats, too, has to end once a rank has left it.
            return max(self._left_at, self._moved_at or self._left_at), self._hang_timeout_seconds
        if self._outside:
            return None, self._hang_timeout_seconds
        limit = self._hang_timeout_seconds
        if any(self._long_phase.values()):
            limit = max(self._first_step_timeout_seconds, limit)
        return self._moved_at, limit

    @property
    def _has_left_behind(self) -> bool:
        """Whether a rank is in a job's body that another one has left."""
        return len(self._leaving | self._outside) < self._world_size

    def _look_for_stall(self, now: float) -> Sequence[Action]:
        since, limit = self._standing_still()
        if since is None or now - since < limit:
            self._asked_at = None
            return []
        if self._asked_at is None:
            self._asked_at = now
            self._stands.clear()
            return [AskStacks()]
        return self._stall() if now - self._asked_at >= _STACKS_SECONDS else []

    def _stall(self) -> Sequence[Action]:
        if self._settled or self._asked_at is None:
            return []
        stands = tuple(self._stands[rank] for rank in sorted(self._stands))
        _, limit = self._standing_still()
        left = tuple(sorted(self._leaving)) if len(self._leaving) < self._world_size else ()
        return self._condemn(Stall(limit, stands, left))

    def _give_floor(self, rank: int, code: int, now: float) -> Sequence[Action]:
        self._settled = True
        self._speaker = (rank, code, now)
        self._echoes.pop(rank, None)
        return [Reply(rank, may_speak=True), *self._silence_echoes()]

    def _condemn(self, verdict: Verdict) -> Sequence[Action]:
        self._settled = True
        silence = self._silence_echoes()
        return [*silence, Tell(verdict), End(verdict.code)]

    def _silence_echoes(self) -> list[Action]:
        echoes = list(self._echoes)
        self._echoes.clear()
        return [Reply(rank, may_speak=False) for rank in echoes]
