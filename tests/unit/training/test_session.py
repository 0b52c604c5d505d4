"""A save is asked for when reads fail: once for each trouble, not once for each failure."""

from __future__ import annotations

from types import SimpleNamespace

from hpctrain.batch.stop import SAVE_DUE
from hpctrain.training.session import LEAST_SECONDS, ReadTrouble


def test_once_a_trouble() -> None:
    reads, clock = SimpleNamespace(failed_reads=0), SimpleNamespace(now=1000.0)
    trouble = ReadTrouble(reads, lambda: clock.now)
    assert trouble.bit() == 0
    reads.failed_reads = 1
    assert [trouble.bit(), trouble.bit()] == [SAVE_DUE, 0]
    clock.now += LEAST_SECONDS / 2
    reads.failed_reads = 3
    assert trouble.bit() == 0
    clock.now += LEAST_SECONDS
    assert trouble.bit() == 0  # what failed before is known
    reads.failed_reads = 4
    assert [trouble.bit(), trouble.bit()] == [SAVE_DUE, 0]
