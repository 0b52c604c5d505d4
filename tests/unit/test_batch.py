"""Signals set a flag, all ranks stop at the same boundary, and word of the end is left."""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from hpctrain.batch.outcome import Outcome, read_outcome, status_text, write_outcome
from hpctrain.batch.signals import STOP_SIGNALS, SignalFlag, bit, describe
from hpctrain.batch.stop import StopAgreement
from hpctrain.errors import CheckpointError, ConfigError, ExitCode


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
                lambda: len(parts) == self.memory.world_size, timeout=20
            )
        return tuple(max(column) for column in zip(*parts, strict=True))


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("signalled", [0, 1, 17])
def test_all_ranks_stop_at_the_same_boundary(world_size: int, every: int, signalled: int) -> None:
    """Only the last rank gets the signal, at some boundary, and ranks run at their own speed."""
    memory = Memory(world_size)
    stopped: dict[int, tuple[int, int]] = {}

    def run(rank: int) -> None:
        draw = random.Random(rank)
        flag = 0
        agreement = StopAgreement(MemoryCommunicator(memory, rank), every, lambda: flag)
        for boundary in range(60):
            if rank == world_size - 1 and boundary == signalled:
                flag = bit(signal.SIGUSR1)
            reasons = agreement.boundary()
            if reasons:
                stopped[rank] = boundary, reasons
                break
            time.sleep(draw.random() * 0.002)
        agreement.flush()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert len(stopped) == world_size
    (where, reasons) = stopped[0]
    assert set(stopped.values()) == {(where, reasons)}
    assert describe(reasons) == "SIGUSR1"
    assert signalled <= where <= signalled + 2 * every


def test_nothing_is_left_behind_at_the_end() -> None:
    memory = Memory(1)
    agreement = StopAgreement(MemoryCommunicator(memory, 0), 2, lambda: 0)
    assert [agreement.boundary() for _ in range(5)] == [0] * 5
    assert agreement.flush() == 0
    assert len(memory.rounds) == 2


def outcome(code: int | None, reason: str = "x") -> Outcome:
    return Outcome(code=code, reason=reason, step=120, tries=2)


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (None, "running, or was killed"),
        (ExitCode.DONE, "complete"),
        (ExitCode.STOPPED, "stopped and saved: submit again"),
        (ExitCode.BUG, "failed"),
    ],
)
def test_status(tmp_path: Path, code: int | None, words: str) -> None:
    write_outcome(tmp_path, outcome(code))
    (tmp_path / "latest").write_text("step-00000120\n", encoding="utf-8")
    text = status_text(tmp_path)
    assert words in text
    assert "step-00000120" in text
    found = read_outcome(tmp_path)
    assert found is not None
    assert (found.code, found.step, found.tries) == (code, 120, 2)
    assert json.loads((tmp_path / "exit.json").read_bytes())["code"] == code


def test_status_of_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such folder"):
        status_text(tmp_path / "nothing")
    with pytest.raises(ConfigError, match="holds no run"):
        status_text(tmp_path)


@pytest.mark.parametrize("content", ["", "{", '{"code": 1}', "[]", '{"surplus": 1}'])
def test_a_damaged_outcome_is_told(tmp_path: Path, content: str) -> None:
    (tmp_path / "exit.json").write_text(content, encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"exit\.json cannot be read"):
        read_outcome(tmp_path)


def test_a_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot write"):
        write_outcome(tmp_path / "missing", outcome(0))
