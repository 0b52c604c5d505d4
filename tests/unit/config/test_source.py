"""What can be wrong with a file before anything in it has a meaning."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpctrain.config.toml import DEEPEST, parse, read, refuse_depth
from hpctrain.errors import ConfigError


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def refusal(path: str) -> str:
    with pytest.raises(ConfigError) as caught:
        refuse_depth(read(path))
    return str(caught.value)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"a = 1\nb = \n", "c.toml, line 2, column 5: not TOML: Invalid value\n  b ="),
        (b"a = 1\r\nb = tru\r\n", "c.toml, line 2, column 5: not TOML: Invalid value\n  b = tru"),
        (
            b"a = 1\na = 2",
            (
                "c.toml, line 2, column 6 (the end of the file): not TOML: "
                "Cannot overwrite a value\n  a = 2"
            ),
        ),
        (
            b"a = [\n1,\n",
            "c.toml, line 3, column 1 (the end of the file): not TOML: Invalid value",
        ),
        (
            b"a = \x1b[31m",
            "c.toml, line 1, column 5: not TOML: Invalid value\n  a = \\x1b[31m",
        ),
        (
            b"[a.b]\n[a.b]\n",
            "c.toml, line 2, column 5: not TOML: Cannot declare [a.b] twice\n  [a.b]",
        ),
        (b"a = 1\nb = '\xff'", "c.toml, line 2: not UTF-8, which TOML has to be"),
        ("a = 1".encode("utf-16"), "c.toml, line 1: not UTF-8, which TOML has to be"),
        (b"\n\na = " + b"9" * 5000, "c.toml, line 3: a number of thousands of digits"),
        (b"\na = " + b"[" * 5000, "c.toml, line 2: nested too deeply to be read"),
        (
            b"[s]\nb = " + b"[" * 20 + b"]" * 20,
            "c.toml: 1 mistake\n  line 2  s.b: nested more than 16 levels deep",
        ),
        (
            b"[s]\n" + b"a." * 30 + b"b = 1",
            f"c.toml: 1 mistake\n  line 2  s{'.a' * 15}: nested more than 16 levels deep",
        ),
        (b"#" * 1_000_001, "c.toml: larger than 1,000,000 bytes: is this a config?"),
    ],
)
def test_broken_files(content: bytes, expected: str) -> None:
    Path("c.toml").write_bytes(content)
    assert refusal("c.toml") == expected


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("configs/rum.toml", "configs/rum.toml: no such file; did you mean configs/run.toml?"),
        ("xyz.toml", "xyz.toml: no such file"),
        ("configs", "configs: is a folder; name the TOML file in it"),
        ("configs/run.toml/x", "configs/run.toml/x: cannot be read: Not a directory"),
        ("a\0b", "a\\x00b: cannot be read: embedded null byte"),
        ("a" * 300, "a" * 300 + ": cannot be read: File name too long"),
    ],
)
def test_files_that_cannot_be_read(path: str, expected: str) -> None:
    Path("configs").mkdir()
    Path("configs/run.toml").touch()
    assert refusal(path) == expected


def test_a_byte_order_mark_and_windows_line_ends() -> None:
    Path("c.toml").write_bytes(b"\xef\xbb\xbf[s]\r\na = 1\r\n")
    source = read("c.toml")
    assert source.table == {"s": {"a": 1}}
    assert source.lines == {("s",): 1, ("s", "a"): 2}


def test_what_is_just_not_too_deep() -> None:
    refuse_depth(parse("a = " + "[" * (DEEPEST - 1) + "]" * (DEEPEST - 1), "c.toml"))


def test_a_mistake_is_placed_at_the_key_or_at_the_table_around_it() -> None:
    source = parse("[s]\na = 1\n[s.arguments]\nb = 2\n[t]\nu.v = 3", "c.toml")
    source.overrides = {("s", "c"): 4, ("w", "x"): 5}
    places = {
        ("s", "a"): (2, None),
        ("s", "b"): (4, None),
        ("s", "c"): (None, 4),
        ("s", "none"): (3, None),
        ("t", "u", "v", "w"): (6, None),
        ("t", "none"): (5, None),
        ("w",): (None, 5),
        ("none",): (None, None),
    }
    for key, place in places.items():
        mistake = source.mistake(key, "wrong")
        assert (mistake.line, mistake.override) == place, key
