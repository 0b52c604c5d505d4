"""Which processes make this world, in a store that may outlive worlds.

torchrun's agent holds one store over all restarts of its workers: the keys of the world before are
still there, and TORCHELASTIC_RESTART_COUNT counts the restarts of one node only. So every process
says hello with a nonce of its own. Rank 0 answers the processes that it hears of, the newest of
each rank, and the world is made once all of them have confirmed the answer of this rank 0. What
processes of the past have left in the store fits to no nonce of the present.

Source: pytorch/pytorch issue 108158, on the count of restarts.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from hpctrain.errors import LaunchError
from hpctrain.utils.text import listed, printable

_PAUSE_SECONDS = 0.01
# Thousands of ranks ask one store.
_LONGEST_PAUSE_SECONDS = 0.25
_SHOWN = 8

_PREFIX = "hpctrain/generation"
_COMPLETE = f"{_PREFIX}/complete"
_HELLOS = f"{_PREFIX}/hellos"
_NO = "no, the world size is "
# The store is open to the network: what is no hello is not one of ours.
_HELLO = re.compile(r"(\d{1,9}) ([0-9a-f]{16}) (\d{1,9})", re.ASCII)
_MOST_AT_ONCE = 100_000


class KeyValueStore(Protocol):
    """The part of torch.distributed.Store that is needed here."""

    def set(self, key: str, value: str) -> None: ...
    def get(self, key: str) -> bytes: ...
    def add(self, key: str, amount: int) -> int: ...
    def check(self, keys: list[str]) -> bool: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """One process that wants to be part of a world.

    Attributes:
        place: of the store, for messages.
        may_restart: an agent may start all processes again, and holds the store meanwhile.
        is_on_loopback: the store is there, where no other host comes.
    """

    rank: int
    world_size: int
    place: str
    may_restart: bool
    is_on_loopback: bool = False
    nonce: str = field(default_factory=lambda: secrets.token_hex(8))


def may_restart(env: Mapping[str, str]) -> bool:
    """Tell whether an agent of torch's started this process, and holds the store."""
    return "TORCHELASTIC_RUN_ID" in env and env.get("TORCHELASTIC_USE_AGENT_STORE") != "False"


def agree(store: KeyValueStore, process: Process, *, longest_seconds: float) -> str:
    """Return the name of this world, the same on all of its ranks. Collective: all ranks.

    Raises:
        LaunchError: if another job has its world in the store, two processes have one rank, or
            some do not come in time.
    """
    # Without an agent nobody restarts a world: one that is complete is another job's.
    if not process.may_restart and store.check([_COMPLETE]):
        raise _met_another(process, f"rank {process.rank} is there")
    end = time.monotonic() + longest_seconds
    if process.rank == 0:
        return _gather(store, process, end)
    return _join(store, process, end)


def _gather(store: KeyValueStore, process: Process, end: float) -> str:
    """Be rank 0: answer every hello, until each rank's newest process has confirmed."""
    generation = process.nonce
    if not process.may_restart and store.add(f"{_PREFIX}/rank 0", 1) != 1:
        raise _met_another(process, "rank 0 is there")
    hellos, confirmations = _Queue(store, _HELLOS), _Queue(store, _confirmations(generation))
    newest: dict[int, str] = {}
    confirmed: set[str] = set()
    while len(newest) < process.world_size - 1 or not confirmed.issuperset(newest.values()):
        if time.monotonic() > end:
            raise _somebody_is_missing(process, newest, confirmed)
        time.sleep(_PAUSE_SECONDS)
        for hello in filter(None, map(_HELLO.fullmatch, hellos.new())):
            rank, nonce, world_size = int(hello[1]), hello[2], int(hello[3])
            fits = world_size == process.world_size and 0 < rank < process.world_size
            answer = generation if fits else f"{_NO}{process.world_size}"
            store.set(f"{_PREFIX}/answer/{nonce}", answer)
            if fits:
                newest[rank] = nonce
        confirmed.update(confirmations.new())
    store.set(_members(generation), f"members {' '.join(newest.values())}")
    store.set(_COMPLETE, generation)
    return generation


def _join(store: KeyValueStore, process: Process, end: float) -> str:
    """Be another rank: confirm what the present rank 0 answers; one of the past never does."""
    _append(store, _HELLOS, f"{process.rank} {process.nonce} {process.world_size}")
    answer_key = f"{_PREFIX}/answer/{process.nonce}"
    generation, pause = "", _PAUSE_SECONDS
    while True:
        answer = _text(store.get(answer_key)) if store.check([answer_key]) else ""
        if answer.startswith(_NO):
            raise _met_another(process, f"its WORLD_SIZE is {printable(answer[len(_NO) :][:20])}")
        if answer != generation:
            generation = answer
            _append(store, _confirmations(generation), process.nonce)
        if generation and store.check([_members(generation)]):
            if process.nonce not in _text(store.get(_members(generation))).split():
                raise _met_another(process, f"rank {process.rank} is there twice")
            return generation
        if not generation and not process.may_restart and store.check([_COMPLETE]):
            raise _met_another(process, f"rank {process.rank} is there")
        if time.monotonic() > end:
            raise LaunchError(
                f"rank {process.rank} has waited in vain at MASTER_ADDR:MASTER_PORT = "
                f"{process.place}: {'some other rank' if generation else 'rank 0'} has not come"
            )
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)


class _Queue:
    """Texts that others append, in the order of their coming."""

    def __init__(self, store: KeyValueStore, name: str) -> None:
        self._store = store
        self._name = name
        self._count = 0
        # Announced, and not there yet; a process that was killed in between leaves one for ever.
        self._awaited: list[int] = []

    def new(self) -> list[str]:
        """Return those that were not there before."""
        count = min(self._store.add(self._name, 0), self._count + _MOST_AT_ONCE)
        awaited = [*self._awaited, *range(self._count + 1, count + 1)]
        there = [number for number in awaited if self._store.check([f"{self._name}/{number}"])]
        self._count = count
        self._awaited = [number for number in awaited if number not in there]
        return [_text(self._store.get(f"{self._name}/{number}")) for number in there]


def _text(value: bytes) -> str:
    return value.decode("utf-8", errors="replace")


def _append(store: KeyValueStore, name: str, text: str) -> None:
    """Append a text to the queue of a name."""
    store.set(f"{name}/{store.add(name, 1)}", text)


def _confirmations(generation: str) -> str:
    return f"{_PREFIX}/{generation}/confirmations"


def _members(generation: str) -> str:
    return f"{_PREFIX}/{generation}/members"


def _met_another(process: Process, wrong: str) -> LaunchError:
    return LaunchError(
        f"rank {process.rank} of {process.world_size} met another world at MASTER_ADDR:MASTER_PORT "
        f"= {process.place}: {wrong}. Another job uses this port, or RANK and WORLD_SIZE do not "
        "fit together.",
        everywhere=True,
    )


def _somebody_is_missing(
    process: Process, newest: Mapping[int, str], confirmed: set[str]
) -> LaunchError:
    missing = [rank for rank in range(1, process.world_size) if newest.get(rank) not in confirmed]
    shown = listed([str(rank) for rank in missing], _SHOWN)
    text = (
        f"{len(missing)} of {process.world_size} ranks have not come to MASTER_ADDR:MASTER_PORT = "
        f"{process.place} in time: {shown}"
    )
    if process.is_on_loopback:
        text += (
            ". That is loopback, which no other host reaches: for ranks on several hosts set "
            "MASTER_ADDR to an address of rank 0's host"
        )
    return LaunchError(text)
