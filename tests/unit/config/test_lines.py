"""The line of every key, in all the shapes that TOML allows."""

from __future__ import annotations

import pytest

from hpctrain.config.toml import deepest_line, locate_keys


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", {}),
        ("# only = 1\n\n   # a comment", {}),
        ("a = 1", {("a",): 1}),
        ("a = 1\n\nb = 2\n", {("a",): 1, ("b",): 3}),
        ("[s]\na = 1 # [t]\nb = 2", {("s",): 1, ("s", "a"): 2, ("s", "b"): 3}),
        ("[s.t]\na = 1", {("s",): 1, ("s", "t"): 1, ("s", "t", "a"): 2}),
        ("[s]\na.b.c = 1", {("s",): 1, ("s", "a"): 2, ("s", "a", "b"): 2, ("s", "a", "b", "c"): 2}),
        ("[ s . 't' ]  # [u]\na = 1", {("s",): 1, ("s", "t"): 1, ("s", "t", "a"): 2}),
        ('"a b" = 1\n"c.d".e = 2', {("a b",): 1, ("c.d",): 2, ("c.d", "e"): 2}),
        ("a = [\n  1, # ]\n  2,\n]\nb = 3", {("a",): 1, ("b",): 5}),
        ('a = ["]", [\n"#"]]\nb = 3', {("a",): 1, ("b",): 3}),
        ('a = """\nb = 1\n[s]\n"""\nc = 2', {("a",): 1, ("c",): 5}),
        ("a = '''\n# \"\"\"\n''''\nc = 2", {("a",): 1, ("c",): 4}),
        ('a = """x\\"""\n""""\nc = 2', {("a",): 1, ("c",): 3}),
        (
            'a = """"""\nb = ""\nc = \'\'\nd = "\\\\"\ne = 5',
            {("a",): 1, ("b",): 2, ("c",): 3, ("d",): 4, ("e",): 5},
        ),
        ("a = '\\'\nb = 2", {("a",): 1, ("b",): 2}),
        (
            "a = { b = 1, c = { d = 2 } }",
            {("a",): 1, ("a", "b"): 1, ("a", "c"): 1, ("a", "c", "d"): 1},
        ),
        ("[[s]]\na = 1\n[[s]]\na = 2\nb = 3", {("s",): 1, ("s", "a"): 2, ("s", "b"): 5}),
        (
            "[s]\n[t]\na = 1\n[s.u]\na = 2",
            {
                ("s",): 1,
                ("t",): 2,
                ("t", "a"): 3,
                ("s", "u"): 4,
                ("s", "u", "a"): 5,
            },
        ),
        ("\t a = 1\n  [s]\n  b = 2", {("a",): 1, ("s",): 2, ("s", "b"): 3}),
    ],
)
def test_locate_keys(text: str, expected: dict[tuple[str, ...], int]) -> None:
    assert locate_keys(text) == expected


def test_a_long_list_is_read_once() -> None:
    """Its 20,000 lines would take minutes if every line were tried as its end."""
    text = "a = [\n" + "[1],\n" * 20_000 + "]\nb = 1"
    assert locate_keys(text) == {("a",): 1, ("b",): 20_003}


def test_deepest_line() -> None:
    assert deepest_line("a = 1\nb = [[1], '[[[[']\n# [[[[\nc = [\n[\n[]]]") == 6
