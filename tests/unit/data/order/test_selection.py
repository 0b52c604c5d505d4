"""Spans of rows against plain sets of rows."""

from __future__ import annotations

import random

import numpy as np
import pytest

from hpctrain.data.order.selection import (
    SampleSelection,
    Spans,
    common,
    cut,
    default_piece_rows,
    merged,
    piece_stops,
    spans_where,
    split_pieces,
)

ROWS = 60


def rows_of(spans: Spans) -> list[int]:
    pairs = zip(spans.starts.tolist(), spans.stops.tolist(), strict=True)
    return [row for start, stop in pairs for row in range(start, stop)]


def some_mask(seed: int) -> np.ndarray:
    draw = random.Random(seed)
    return np.array([draw.random() < draw.choice([0.1, 0.5, 0.95]) for _ in range(ROWS)])


@pytest.mark.parametrize("seed", range(20))
def test_masks(seed: int) -> None:
    one, other = some_mask(seed), some_mask(seed + 1000)
    spans = spans_where(one)
    assert rows_of(spans) == np.flatnonzero(one).tolist()
    assert spans.rows == one.sum()
    halves = [spans_where(one[:25]), spans_where(one[25:], 25)]
    assert rows_of(merged(halves)) == rows_of(spans)
    assert merged(halves).starts.tolist() == spans.starts.tolist()
    assert rows_of(common(spans, spans_where(other))) == np.flatnonzero(one & other).tolist()


@pytest.mark.parametrize("mask", [np.zeros(ROWS, bool), np.ones(ROWS, bool)], ids=["none", "all"])
def test_masks_of_one_kind(mask: np.ndarray) -> None:
    spans = merged([spans_where(mask), spans_where(mask[:0], ROWS)])
    assert rows_of(spans) == np.flatnonzero(mask).tolist()
    assert rows_of(common(spans, Spans.of(0, ROWS))) == np.flatnonzero(mask).tolist()
    assert SampleSelection.of(spans, 1, 1).samples == mask.sum()


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize(("reach", "stride"), [(1, 1), (3, 1), (1, 4), (5, 2), (2, 7)])
def test_samples_of_spans(seed: int, reach: int, stride: int) -> None:
    mask = some_mask(seed)
    spans = cut(spans_where(mask), np.array([20, 41, ROWS]))
    expected = [
        row
        for start, stop in zip(spans.starts.tolist(), spans.stops.tolist(), strict=True)
        for row in range(start, stop - reach + 1, stride)
    ]
    selection = SampleSelection.of(spans, reach, stride)
    assert selection.samples == len(expected)
    assert selection.rows(np.arange(len(expected))).tolist() == expected
    for row in expected:  # whole within the mask, and within one file
        assert mask[row : row + reach].all()
        assert len({sum(row + i >= stop for stop in (20, 41)) for i in range(reach)}) == 1


@pytest.mark.parametrize("seed", range(20))
def test_runs_of_samples_are_cut_where_the_rows_are_apart(seed: int) -> None:
    draw = random.Random(seed)
    selection = SampleSelection.of(spans_where(some_mask(seed)), 1, draw.choice([1, 3]))
    starts = [draw.randrange(selection.samples) for _ in range(5)]
    counts = [draw.randint(1, selection.samples - start) for start in starts]
    places = np.cumsum([0, *counts[:-1]])
    found = np.full(sum(counts), -1)
    pieces = selection.locate(np.array(starts), np.array(counts), places)
    for row, count, place in zip(*(each.tolist() for each in pieces), strict=True):
        found[place : place + count] = row + np.arange(count) * selection.stride
    samples = np.concatenate(
        [start + np.arange(n) for start, n in zip(starts, counts, strict=True)]
    )
    assert (found == selection.rows(samples)).all()


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.5, 0.99])
@pytest.mark.parametrize("stops", [[10, 20], [3, 50, 60], list(range(1, 61)), [59, 60]])
def test_parts_of_a_split_are_disjoint_and_whole(fraction: float, stops: list[int]) -> None:
    first, second = split_pieces(np.array(stops), fraction, 7)
    assert sorted(rows_of(first) + rows_of(second)) == list(range(stops[-1]))
    assert first.rows > 0
    assert second.rows > 0
    if len(stops) == 60:
        assert second.rows == max(1, round(60 * fraction))
    again = split_pieces(np.array(stops), fraction, 7)
    assert rows_of(again[1]) == rows_of(second)


def test_a_split_is_what_it_was() -> None:
    """Another hash, or another use of it, would mix old training with new evaluation."""
    _, second = split_pieces(piece_stops(40, 4), 0.3, 1)
    assert second.starts.tolist() == [8, 16, 32]
    _, other = split_pieces(piece_stops(40, 4), 0.3, 2)
    assert rows_of(other) != rows_of(second)


@pytest.mark.parametrize(
    ("rows", "row_bytes", "reach", "expected"),
    [
        (500, 8, 1, 1),
        (50_000, 12_288, 1, 50),  # a thousandth of the rows
        (10**6, 12_288, 1, 85),  # 1 MiB
        (10**9, 12_288, 1, 15_259),  # at most 65,536 pieces
        (10**6, 2**22, 1, 16),
        (500, 8, 5, 50),  # ten windows
    ],
)
def test_pieces_of_a_split(rows: int, row_bytes: int, reach: int, expected: int) -> None:
    assert default_piece_rows(rows, row_bytes, reach) == expected


def test_the_last_piece_is_shorter() -> None:
    assert piece_stops(10, 4).tolist() == [4, 8, 10]
    assert piece_stops(8, 4).tolist() == [4, 8]
