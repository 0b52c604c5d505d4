"""A config to TOML and back."""

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
    DataSection,
    OptimizerSection,
    RunSection,
    TaskSection,
    TrainingSection,
)

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
    assert "validation" not in text
    sections = [line[1:-1] for line in text.split("\n") if line.startswith("[") and "." not in line]
    assert sections == [field.name for field in dataclasses.fields(Config)]


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
