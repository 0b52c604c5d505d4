"""Batches of one rank in an evaluation: every sample once, whatever the world and the batches."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from hpctrain.data.order.batches import EvaluationPlan, EvaluationShare, RankShare


def served(plan: EvaluationPlan, batches: int) -> list[list[int]]:
    """Return the rows of every batch, of which so many are asked for at a time."""
    found = []
    for bounds, places in plan.groups(batches):
        rows = plan.rows(places).tolist()
        cuts = [bound - bounds[0] for bound in bounds]
        found += [rows[a:b] for a, b in itertools.pairwise(cuts)]
    return found


@pytest.mark.parametrize("batches", [1, 3])
@pytest.mark.parametrize("samples", [1, 7, 24])
@pytest.mark.parametrize("world_size", [1, 2, 3, 30])
def test_every_sample_once_in_order(samples: int, world_size: int, batches: int) -> None:
    plans = [
        EvaluationPlan(EvaluationShare(batch_size=4, ranks=RankShare(rank, world_size)), samples)
        for rank in range(world_size)
    ]
    found = [served(plan, batches) for plan in plans]
    assert [row for rank in found for batch in rank for row in batch] == list(range(samples))
    assert [len(plan) for plan in plans] == [len(rank) for rank in found]
    assert {plan.most_batches for plan in plans} == {max(map(len, found))}


def test_a_part_of_the_samples_is_the_first_of_them() -> None:
    ranks = [RankShare(rank, 2) for rank in range(2)]
    plans = [EvaluationPlan(EvaluationShare(batch_size=2, ranks=e, samples=5), 9) for e in ranks]
    assert [served(plan, 2) for plan in plans] == [[[0, 1]], [[2, 3], [4]]]


def test_rows_that_are_named_are_served_as_they_come() -> None:
    rows = np.array([8, 3, 5], np.int64)
    plan = EvaluationPlan(EvaluationShare(batch_size=2, ranks=RankShare(1, 2), rows=rows), 9)
    assert served(plan, 1) == served(plan, 2) == [[8, 3], [5]]
    assert [bounds for bounds, _ in plan.groups(1)] == [[0, 2], [2, 3]]


def test_batches_of_their_own_lengths_are_cut_in_every_share() -> None:
    def cut(rows: np.ndarray) -> list[tuple[int, int]]:
        """Cut before every row that is a multiple of 4."""
        stops = [at for at in range(1, len(rows)) if rows[at] % 4 == 0]
        return list(zip([0, *stops], [*stops, len(rows)], strict=True))

    plans = [
        EvaluationPlan(EvaluationShare(batch_size=9, ranks=RankShare(rank, 2)), 11, cut)
        for rank in range(2)
    ]
    assert served(plans[0], 2) == [[0, 1, 2, 3], [4]]
    assert served(plans[1], 2) == [[5, 6, 7], [8, 9, 10]]
    assert [plan.most_batches for plan in plans] == [2, 2]
    empty = EvaluationPlan(EvaluationShare(batch_size=9, ranks=RankShare(0, 2)), 1, cut)
    assert (len(empty), empty.most_batches, served(empty, 2)) == (0, 1, [])
