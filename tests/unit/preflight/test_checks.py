"""Failures on any rank are findings; on some ranks only, while others wait, they end the job."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from helpers.preflight_tables import topology
from torch import distributed as dist
from torch.distributed import distributed_c10d

from hpctrain.launch.communicators import SingleCommunicator
from hpctrain.preflight import checks
from hpctrain.preflight.checks import Answer, CheckError, ask, failing_together


def test_a_failure_on_any_rank_is_a_finding() -> None:
    here = topology(world_size=1)
    assert ask(here, SingleCommunicator(), lambda: 7) == [7]

    def broken() -> None:
        raise ValueError("the model is unwell")

    with pytest.raises(CheckError) as raised:
        ask(here, SingleCommunicator(), broken)
    assert str(raised.value) == "ValueError: the model is unwell"
    answers = [Answer(0, "a", 1), Answer(1, "b", None, "unwell"), Answer(2, "b", None, "unwell")]
    some = CheckError(answers, 3).finding("step", "rest")
    assert some.fact == "rank 1 on b (and 1 more of 3): unwell"
    assert (some.status, some.values["ranks"]) == ("fail", [1, 2])
    assert str(CheckError(answers[1:], 2)) == "unwell"  # all of them: no rank is to be named


@pytest.fixture(autouse=True)
def _store(monkeypatch: pytest.MonkeyPatch) -> None:
    store = dist.HashStore()
    monkeypatch.setattr(distributed_c10d, "_get_default_store", lambda: store)


def unwell() -> None:
    raise MemoryError("out of memory")


def fails(rank: int, ranks: int, patience: float) -> BaseException:
    here = topology(rank=rank, world_size=ranks)
    with pytest.raises(BaseException) as caught:  # noqa: PT011 - which one is the question
        failing_together("step", here, unwell, patience)()
    return caught.value


def test_where_all_fail_that_is_a_finding() -> None:
    with ThreadPoolExecutor(3) as pool:
        found: Any = list(pool.map(fails, range(3), [3] * 3, [600.0] * 3))
    assert {type(error) for error in found} == {MemoryError}


def test_where_some_fail_the_job_ends_and_says_of_what() -> None:
    with ThreadPoolExecutor(2) as pool:
        found: Any = list(pool.map(fails, range(2), [3] * 2, [0.3] * 2))
    for rank, error in enumerate(found):
        assert isinstance(error, checks._FailedAloneError)
        assert not isinstance(error, Exception), "no check takes it for its own"
        assert f"2 of 3 ranks failed, and the others wait for them. Rank {rank} on" in str(error)
        assert str(error).endswith("MemoryError: out of memory")


def test_one_process_has_no_others() -> None:
    assert isinstance(fails(0, 1, 600.0), MemoryError)
