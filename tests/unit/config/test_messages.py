"""How mistakes are told."""

from __future__ import annotations

from typing import Any

import pytest

from hpctrain.config.messages import NOT_GIVEN, Mistake, config_error, dotted, shown
from hpctrain.utils.text import did_you_mean, printable, printable_lines


def test_one_message_for_all_in_the_order_of_the_file() -> None:
    mistakes = [
        Mistake(key=("run", "b"), problem="wrong", value="x", override=1),
        Mistake(key=("model",), problem="missing section"),
        Mistake(key=("run", "a"), problem="wrong", value=True, override=0),
        Mistake(key=("data", "lanes"), problem="wrong", value=3, line=10),
        Mistake(key=("data", "train"), problem="missing", line=9),
    ]
    assert str(config_error("c.toml", mistakes)) == (
        "c.toml: 5 mistakes\n"
        "  line 9    data.train: missing\n"
        "  line 10   data.lanes = 3: wrong\n"
        "            model: missing section\n"
        "  override  run.a = true: wrong\n"
        '  override  run.b = "x": wrong'
    )
    assert str(config_error("c\n.toml", mistakes[1:2])) == (
        "c\\n.toml: 1 mistake\n  model: missing section"
    )


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (True, "true"),
        (1, "1"),
        (-0.5, "-0.5"),
        (1e-20, "1e-20"),
        (float("nan"), "nan"),
        ("a", '"a"'),
        ("a\x1b[31m\n", '"a\\x1b[31m\\n"'),
        ("é" * 10, '"' + "é" * 10 + '"'),
        ("\u202e", '"\\u202e"'),
        ("\ud800", '"\\ud800"'),
        ("a" * 1000, '"' + "a" * 56 + "..."),
        ([1, "a", [2, [3]]], '[1, "a", [...]]'),
        (list(range(1000)), "[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16..."),
        ({}, "{}"),
        ({"a": 1}, "{...}"),
        (10**60, "a very long number"),
    ],
)
def test_shown(value: Any, expected: str) -> None:
    assert shown(value) == expected


def test_what_is_not_given_is_not_shown() -> None:
    assert str(Mistake(key=("a",), problem="wrong", value=NOT_GIVEN)) == "a: wrong"


def test_dotted() -> None:
    assert dotted(("a", "b-1", "c d", "")) == 'a.b-1."c d".""'
    assert len(dotted(("a" * 1000,))) == 60


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("tab\tñ", "tab\\tñ"),
        ("\x1b[2J", "\\x1b[2J"),
        ("a\nhpctrain: all is well", "a\\nhpctrain: all is well"),
        ("a\u202eb\u2066c", "a\\u202eb\\u2066c"),  # right to left from here on
        ("\ud800\0\x9b", "\\ud800\\x00\\x9b"),
        ("\u2028\u00a0", "\\u2028\\xa0"),
    ],
)
def test_printable(text: str, expected: str) -> None:
    assert printable(text) == expected


def test_lines_stay_lines() -> None:
    assert printable_lines("a\x1bb\r\n\tc\n") == "a\\x1bb\\r\n\\tc\n"


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("globl_batch", "; did you mean data.global_batch?"),
        ("GLOBAL_BATCH", "; did you mean data.global_batch?"),
        ("zzz", ""),
        ("global_batch" * 10_000, ""),
    ],
)
def test_did_you_mean(word: str, expected: str) -> None:
    assert did_you_mean(word, ["lanes", "global_batch"], prefix="data.") == expected
