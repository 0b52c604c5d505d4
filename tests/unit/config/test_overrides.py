"""Single keys from the command line."""

from __future__ import annotations

from typing import Any

import pytest

from hpctrain.config.toml import Source, apply_overrides


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
