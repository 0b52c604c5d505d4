"""Numbers as people read them."""

from __future__ import annotations

import math

import pytest

from hpctrain.utils import text


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0, "0.00"),
        (0.424, "0.42"),
        (9.994, "9.99"),
        (9.996, "10.0"),
        (99.94, "99.9"),
        (99.96, "100"),
        (4560.4, "4,560"),
        (1234567, "1,234,567"),
        (-12.34, "-12.3"),
        (math.inf, "inf"),
        (math.nan, "nan"),
    ],
)
def test_number(value: float, expected: str) -> None:
    assert text.number(value) == expected


@pytest.mark.parametrize(
    ("num_bytes", "expected"),
    [
        (0, "0 bytes"),
        (1, "1 byte"),
        (999, "999 bytes"),
        (1000, "1.00 kB"),
        (95_784, "95.8 kB"),
        (999_499, "999 kB"),
        (999_500, "1.00 MB"),
        (201_000_000, "201 MB"),
        (1_204_000_000, "1.20 GB"),
        (3 * 10**18, "3,000 PB"),
    ],
)
def test_size(num_bytes: int, expected: str) -> None:
    assert text.size(num_bytes) == expected


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (-1, "0:00:00"),
        (31.4, "0:00:31"),
        (59.6, "0:01:00"),
        (3723, "1:02:03"),
        (86_399.7, "1 day 0:00:00"),
        (2 * 86_400 + 11_045, "2 days 3:04:05"),
    ],
)
def test_duration(seconds: float, expected: str) -> None:
    assert text.duration(seconds) == expected


@pytest.mark.parametrize(
    ("part", "whole", "expected"),
    [(0, 0, "0 %"), (0, 3, "0 %"), (0.001, 1, "<1 %"), (0.65, 1, "65 %"), (3, 3, "100 %")],
)
def test_percent(part: float, whole: float, expected: str) -> None:
    assert text.percent(part, whole) == expected


def test_plural() -> None:
    assert text.plural(1, "rank") == "1 rank"
    assert text.plural(0, "rank") == "0 ranks"
    assert text.plural(2048, "pass", "passes") == "2,048 passes"


def test_lists_are_cut() -> None:
    names = [str(i) for i in range(2000)]
    assert text.listed(names[:4]) == "0, 1, 2, 3"
    assert text.listed(names, 2, separator="; ") == "0; 1 and 1,998 more"
    assert text.first_lines(names[:2], 2, "  ") == ["  0", "  1"]
    assert text.first_lines(names[:4], 2, "  ", "files") == ["  0", "  1", "  and 2 more files"]
    assert text.first_lines([], 2) == []
