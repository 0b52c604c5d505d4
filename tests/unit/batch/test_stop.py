"""Signals set a flag, and all ranks stop at the same boundary."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from helpers.limits import JOB_SECONDS
from helpers.waiting import wait_for

from hpctrain.batch.scheduler import Deadline
from hpctrain.batch.stop import (
    DEADLINE,
    MARGIN_SECONDS,
    STOP_FILE,
    STOP_SIGNALS,
    Boundary,
    SignalFlag,
    StopAgreement,
    Watch,
    bit,
    describe,
    reserve_seconds,
)


def test_signals_only_set_bits() -> None:
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    with SignalFlag() as flag:
        assert flag.value == 0
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGTERM, signal.SIGURG):
            os.kill(os.getpid(), number)
        assert flag.value == bit(signal.SIGTERM) | bit(signal.SIGUSR1) | bit(signal.SIGURG)
        assert describe(flag.value) == "SIGTERM and SIGUSR1 and SIGURG"
        for _ in range(3):  # a launcher forwards what the terminal sent already
            os.kill(os.getpid(), signal.SIGINT)
        assert flag.value & bit(signal.SIGINT)
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before


@pytest.mark.parametrize("under_nohup", [False, True])
def test_a_hangup_is_a_stop_unless_it_is_ignored_at_entry(under_nohup: bool) -> None:
    kept = signal.SIG_IGN if under_nohup else signal.SIG_DFL
    before = signal.signal(signal.SIGHUP, kept)
    try:
        with SignalFlag() as flag:
            os.kill(os.getpid(), signal.SIGHUP)
            assert flag.value == (0 if under_nohup else bit(signal.SIGHUP))
        assert signal.getsignal(signal.SIGHUP) == kept
    finally:
        signal.signal(signal.SIGHUP, before)


def test_reasons_in_words() -> None:
    assert describe(0) == ""
    reasons = bit(signal.SIGTERM) | DEADLINE | STOP_FILE
    assert describe(reasons) == "SIGTERM and the time limit and the file STOP"


class Memory:
    """Ranks as threads of one process: enough of a communicator for reductions."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self.condition = threading.Condition()
        self.rounds: list[list[tuple[int, ...]]] = []


class MemoryCommunicator:
    def __init__(self, memory: Memory, rank: int) -> None:
        self.memory, self.rank, self.round = memory, rank, 0

    def start_max(self, values: Sequence[int]) -> MemoryPending:
        with self.memory.condition:
            if len(self.memory.rounds) == self.round:
                self.memory.rounds.append([])
            self.memory.rounds[self.round].append(tuple(values))
            self.memory.condition.notify_all()
        self.round += 1
        return MemoryPending(self.memory, self.round - 1)


class MemoryPending:
    def __init__(self, memory: Memory, number: int) -> None:
        self.memory, self.number = memory, number

    def wait(self) -> tuple[int, ...]:
        with self.memory.condition:
            parts = self.memory.rounds[self.number]
            assert self.memory.condition.wait_for(
                lambda: len(parts) == self.memory.world_size, timeout=JOB_SECONDS
            )
        return tuple(max(column) for column in zip(*parts, strict=True))


class Clock:
    """Seconds that a test lets pass."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def run_ranks(world_size: int, body: object) -> None:
    threads = [threading.Thread(target=body, args=(rank,)) for rank in range(world_size)]  # type: ignore[arg-type]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=JOB_SECONDS)
        assert not thread.is_alive()


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("pause", [0.0, 0.0005])
@pytest.mark.parametrize("signalled", [0, 1, 170])
def test_all_ranks_stop_at_the_same_boundary(world_size: int, pause: float, signalled: int) -> None:
    """Only the last rank is told, at some boundary; ranks run at their own speed, steps and
    evaluations take turns."""
    memory = Memory(world_size)
    stopped: dict[int, tuple[int, int]] = {}

    def run(rank: int) -> None:
        draw = random.Random(rank)
        flag = 0
        agreement = StopAgreement(
            MemoryCommunicator(memory, rank), lambda: flag, every_seconds=0.005
        )
        for boundary in range(100_000):
            if rank == world_size - 1 and boundary == signalled:
                flag = bit(signal.SIGUSR1)
            evaluating = boundary // 50 % 2
            reasons = agreement.boundary(Boundary.EVALUATION_BATCH if evaluating else Boundary.STEP)
            if reasons:
                stopped[rank] = boundary, reasons
                break
            if pause and not evaluating:
                time.sleep(draw.random() * pause)
        agreement.flush()

    run_ranks(world_size, run)
    assert len(stopped) == world_size
    (where, reasons) = stopped[0]
    assert set(stopped.values()) == {(where, reasons)}
    assert describe(reasons) == "SIGUSR1"
    assert where >= signalled


def agreements(seconds: Sequence[tuple[Boundary, float]]) -> list[int]:
    """Return after which boundaries one process agrees, if they take these times."""
    memory, clock = Memory(1), Clock()
    agreement = StopAgreement(MemoryCommunicator(memory, 0), lambda: 0, clock=clock)
    found = []
    for number, (kind, duration) in enumerate(seconds):
        clock.now += duration
        before = len(memory.rounds)
        assert agreement.boundary(kind) == 0
        if len(memory.rounds) > before:
            found.append(number)
    return found


STEP, BATCH = Boundary.STEP, Boundary.EVALUATION_BATCH


def test_fast_steps_agree_every_tenth_of_a_second() -> None:
    found = agreements([(STEP, 30.0)] + [(STEP, 0.001)] * 500)
    assert found[:2] == [0, 1]  # the first step compiles: until a usual one was measured
    assert found[2:] == [101, 201, 301, 401]


def test_slow_steps_agree_every_time() -> None:
    assert agreements([(STEP, 2.0)] * 9) == list(range(9))


def test_quick_evaluation_batches_do_not_delay_slow_steps() -> None:
    quick, slow = [(BATCH, 0.0001)] * 2000, [(STEP, 1.5)] * 4
    found = agreements(slow + quick + slow)
    assert found[-4:] == [2004, 2005, 2006, 2007]
    assert sum(4 <= number < 2004 for number in found) < 8


def test_steps_that_become_slow_are_noticed_after_one_interval() -> None:
    found = agreements([(STEP, 0.01)] * 50 + [(STEP, 3.0)] * 20)
    late = [number for number in found if number >= 50]
    assert late[0] < 61
    assert late[2:] == list(range(late[2], 70))


@pytest.mark.parametrize(("seconds", "most"), [(0.001, 260), (0.3, 3), (5.0, 2)])
def test_a_request_is_acted_on_soon(seconds: float, most: int) -> None:
    clock, flag = Clock(), 0
    agreement = StopAgreement(MemoryCommunicator(Memory(1), 0), lambda: flag, clock=clock)
    for _ in range(1000):
        clock.now += seconds
        assert agreement.boundary() == 0
    flag = DEADLINE
    begin = clock.now
    clock.now += seconds
    while not agreement.boundary():
        clock.now += seconds
    assert clock.now - begin <= agreement.reaction_seconds + 1e-6
    assert round((clock.now - begin) / seconds) <= most


def test_phases_end_in_an_agreement_at_once() -> None:
    flag, clock = 0, Clock()
    agreement = StopAgreement(MemoryCommunicator(Memory(1), 0), lambda: flag, clock=clock)
    clock.now += 600  # compiling
    assert agreement.agree() == 0
    assert agreement.reaction_seconds == 0
    flag = STOP_FILE
    assert agreement.agree() == STOP_FILE


def test_nothing_is_left_behind_at_the_end() -> None:
    memory, clock = Memory(1), Clock()
    agreement = StopAgreement(MemoryCommunicator(memory, 0), lambda: 0, clock=clock)
    for _ in range(5):
        clock.now += 0.2
        assert agreement.boundary() == 0
    assert agreement.flush() == 0
    assert agreement.flush() == 0
    assert len(memory.rounds) == 5


@pytest.mark.parametrize(
    ("reaction", "save", "least"),
    [(0.0, 0.0, MARGIN_SECONDS), (2.0, 30.0, 62.0), (60.0, 0.1, 60.2)],
)
def test_the_reserve_covers_reaction_and_two_saves(
    reaction: float, save: float, least: float
) -> None:
    assert least <= reserve_seconds(reaction, save) <= 1.5 * least + MARGIN_SECONDS


def test_rank_zero_watches_the_file_and_the_time(tmp_path: Path) -> None:
    clock, reserve = Clock(), 20.0
    deadline = Deadline(max_seconds=100, environ={}, began=0, warn=pytest.fail, clock=clock)
    with Watch(tmp_path, deadline, lambda: reserve) as watch:
        assert watch.reasons() == 0
        clock.now = 79
        assert watch.reasons() == 0
        clock.now = 81
        assert watch.reasons() == DEADLINE
        reserve = 5.0  # saves turned out quicker
        assert watch.reasons() == 0
        (tmp_path / "STOP").touch()
        wait_for(lambda: watch.reasons() == STOP_FILE)
        (tmp_path / "STOP").unlink()
        wait_for(lambda: watch.reasons() == 0)
