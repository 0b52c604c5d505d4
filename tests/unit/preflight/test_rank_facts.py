"""What a process tells of itself."""

from __future__ import annotations

import pytest

from hpctrain.preflight.rank_facts import parse_ranges


@pytest.mark.parametrize(
    ("text", "numbers"),
    [("0-3,8\n", {0, 1, 2, 3, 8}), ("5", {5}), ("", set()), ("0-1,4-5", {0, 1, 4, 5})],
)
def test_lists_of_the_kernel(text: str, numbers: set[int]) -> None:
    assert parse_ranges(text) == numbers
