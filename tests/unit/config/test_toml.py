"""TOML to a table with the line of every key, overrides on top, and a config back to TOML."""

from __future__ import annotations

import dataclasses
import json
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hpctrain.config import Config, load, to_toml
from hpctrain.config.schema import (
    ComponentSection,
    OptimizerSection,
    RunSection,
    TaskSection,
    TrainingSection,
)
from hpctrain.config.schema_data import DataSection
from hpctrain.config.toml import (
    DEEPEST,
    Source,
    apply_overrides,
    deepest_line,
    locate_keys,
    parse,
    read,
    refuse_depth,
)
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
        (
            b"a = 1\r\nb = tru\r\n",
            "c.toml, line 2, column 5: not TOML: Invalid value; a string needs quotes\n  b = tru",
        ),
        (
            b"a = True\n",
            "c.toml, line 1, column 5: not TOML: Invalid value; did you mean true?\n  a = True",
        ),
        (
            b"a = None\n",
            (
                "c.toml, line 1, column 5: not TOML: Invalid value; TOML has no null: leave the "
                "key out\n  a = None"
            ),
        ),
        (
            b"a = .5\n",
            (
                "c.toml, line 1, column 5: not TOML: Invalid value; a number has digits on both "
                "sides of its point\n  a = .5"
            ),
        ),
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
        (
            "configs/rum.toml",
            "configs/rum.toml: no such file in HERE/configs; did you mean configs/run.toml?",
        ),
        ("configs/xyz", "configs/xyz: no such file in HERE/configs, which has run.toml"),
        ("xyz.toml", "xyz.toml: no such file in HERE, which has no TOML file"),
        ("config/run.toml", "config/run.toml: no such file, nor the folder HERE/config"),
        ("configs", "configs: is a directory; name the TOML file in it"),
        ("configs/run.toml/x", "configs/run.toml/x: cannot be read: Not a directory"),
        ("a\0b", "a\\x00b: cannot be read: embedded null byte"),
        ("a" * 300, "a" * 300 + ": cannot be read: File name too long"),
    ],
)
def test_files_that_cannot_be_read(path: str, expected: str) -> None:
    Path("configs").mkdir()
    Path("configs/run.toml").touch()
    assert refusal(path).replace(str(Path.cwd()), "HERE") == expected


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


def overridden(*overrides: str) -> tuple[dict[str, Any], list[str]]:
    source = Source(path="c.toml", text="", table={"run": {"seed": 1}, "data": {"train": "x"}})
    mistakes = apply_overrides(source, overrides)
    return source.table, [str(mistake) for mistake in mistakes]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2", 2),
        ("2e-3", 2e-3),
        ("true", True),
        ("True", "True"),
        ("[0.9, 0.99]", [0.9, 0.99]),
        ("{ x = 1 }", {"x": 1}),
        ('"2"', "2"),
        ("'it''s'".replace("''", " "), "it s"),
        ("cosine", "cosine"),
        (" cosine ", "cosine"),
        ("my_models:Net", "my_models:Net"),
        ("/scratch/me/*.h5", "/scratch/me/*.h5"),
        ("a=b", "a=b"),
        ("1.2.3", "1.2.3"),
        ("2 # two", 2),
        ("é", "é"),
    ],
)
def test_values(text: str, value: Any) -> None:
    table, mistakes = overridden(f"run.seed={text}")
    assert not mistakes
    assert table["run"]["seed"] == value
    assert type(table["run"]["seed"]) is type(value)


def test_deep_and_new_keys_and_the_last_of_several() -> None:
    table, mistakes = overridden("model.arguments.x.y=1", "run.seed=2", "run.seed=3", "new.key=a")
    assert not mistakes
    assert table["model"] == {"arguments": {"x": {"y": 1}}}
    assert table["run"] == {"seed": 3}
    assert table["new"] == {"key": "a"}


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("run.seed", "run.seed: expected SECTION.KEY=VALUE"),
        ("seed=1", "seed=1: expected SECTION.KEY=VALUE"),
        ("run..seed=1", "run..seed=1: expected SECTION.KEY=VALUE"),
        ("--run.seed", "--run.seed: expected SECTION.KEY=VALUE"),
        ("run.sééd=1", "run.sééd=1: expected SECTION.KEY=VALUE"),
        ("run.seed=", "run.seed=: no value; an empty string is '\"\"', quotes and all"),
        ("run.seed=[1", "run.seed=[1: not a TOML value: Unclosed array"),
        ("run.name='a", "run.name='a: not a TOML value: Expected \"'\""),
        ("run.name=a\udcff", "run.name=a\\udcff: not UTF-8, which TOML has to be"),
        ("run.name=a\nb", "run.name=a\\nb: more than one line"),
        ("data.train.x=1", 'data.train.x=1: data.train is "x", which has no keys'),
        ("run.a=" + "[" * 3000, "run.a=" + "[" * 51 + "...: nested too deeply to be read"),
        ("run.a=" + "9" * 5000, "run.a=" + "9" * 51 + "...: a number of thousands of digits"),
        ("run" + ".a" * 20 + "=1", "run" + ".a" * 20 + "=1: nested more than 16 levels deep"),
    ],
)
def test_what_cannot_be_set(override: str, expected: str) -> None:
    table, mistakes = overridden(override, "run.seed=5")
    assert mistakes == [expected]
    assert table["run"]["seed"] == 5


FLOATS = st.floats(allow_nan=False, allow_infinity=False)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
VALUES = st.recursive(
    st.one_of(st.booleans(), st.integers(-(2**63), 2**63 - 1), FLOATS, TEXTS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)


@pytest.fixture(autouse=True)
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("train").mkdir()


def config(arguments: dict[str, Any] | None = None, lr: float = 0.1) -> Config:
    return Config(
        run=RunSection(name="test"),
        model=ComponentSection(use="mlp", arguments=arguments or {}),
        task=TaskSection(use="regression", inputs=("x", "y")),
        data=DataSection(train="train", global_batch_size=8),
        optimizer=OptimizerSection(use="sgd", lr=lr),
        training=TrainingSection(max_steps=5),
    )


def there_and_back(before: Config) -> Config:
    Path("saved.toml").write_text(to_toml(before), encoding="utf-8", newline="")
    return load("saved.toml")


def test_every_default_is_written_and_what_is_none_is_left_out() -> None:
    text = to_toml(config({"width": 3, "use": "more", "inner": {"x": [1]}}))
    head = (
        '[run]\nname = "test"\ndirectory = "runs"\nseed = 1234\ngroup_writable = false\n'
        "deterministic = false\n\n"
    )
    model = (
        '[model]\nuse = "mlp"\nwidth = 3\n\n[model.inner]\nx = [\n    1,\n]\n\n'
        '[model.arguments]\nuse = "more"\n\n'
    )
    assert text.startswith(head + model)
    assert "\nvalidation =" not in text
    sections = [line[1:-1] for line in text.split("\n") if line.startswith("[") and "." not in line]
    # [[callbacks]] stands once for each, and there is none; [job] is no part of a run.
    known = [field.name for field in dataclasses.fields(Config) if field.name != "job"]
    assert sections == [name for name in known if name not in ("callbacks", "trackers")]


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.dictionaries(TEXTS, VALUES, max_size=4), st.floats(1e-320, 1e308))
def test_round_trip(arguments: dict[str, Any], lr: float) -> None:
    before = config(arguments, lr)
    after = there_and_back(before)
    assert after == before
    # As text, which also tells 1 from 1.0 and 0.0 from -0.0.
    assert json.dumps(after.model.arguments, sort_keys=True) == json.dumps(
        arguments, sort_keys=True
    )
    assert struct.pack("d", after.optimizer.lr) == struct.pack("d", lr)


@pytest.mark.parametrize("name", ["use", "arguments", "lr"])
def test_arguments_that_have_the_name_of_a_key(name: str) -> None:
    before = config({name: {"arguments": 1}})
    assert there_and_back(before) == before
