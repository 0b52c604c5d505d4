"""The rules that a run keeps for life, whatever a new one has."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import tomllib

from hpctrain.config import Config, to_toml
from hpctrain.config.schema import (
    CheckpointSection,
    ComponentSection,
    OptimizerSection,
    RunSection,
    TaskSection,
    TrainingSection,
)
from hpctrain.config.schema_data import DataSection
from hpctrain.config.semantics import (
    CHOOSABLE,
    FIRST,
    NEWEST,
    RECORD,
    VERSION,
    older_rules,
    semantics_of,
)
from hpctrain.config.toml import parse
from hpctrain.config.validate import validate
from hpctrain.errors import CheckpointError, ConfigError


def config(*, allow_data_change: bool = False, **data: Any) -> Config:
    return Config(
        run=RunSection(name="x"),
        model=ComponentSection(use="mlp"),
        task=TaskSection(use="regression", inputs=("x",)),
        data=DataSection(train="train", global_batch_size=8, **data),
        optimizer=OptimizerSection(use="sgd", lr=0.1),
        training=TrainingSection(max_epochs=1),
        checkpoint=CheckpointSection(allow_data_change=allow_data_change),
    )


def test_a_run_has_the_rules_of_the_release_that_began_it() -> None:
    assert semantics_of(config()) == NEWEST
    assert semantics_of(config(), {"step": 3}) == FIRST  # 0.1.0 recorded none
    for rules in (FIRST, NEWEST):
        assert semantics_of(config(), {RECORD: rules.to_json()}) == rules
    assert all(getattr(FIRST, rule) != getattr(NEWEST, rule) for rule in FIRST.to_json())


def test_a_rule_that_came_later_was_until_then_as_in_the_first_release() -> None:
    record = NEWEST.to_json()
    del record["decode"]
    assert semantics_of(config(), {RECORD: record}) == dataclasses.replace(NEWEST, decode="none")


@pytest.mark.parametrize(
    ("key", "began", "asked"),
    [
        ("decode", {}, "cf"),
        ("decode", {RECORD: NEWEST.to_json()}, "none"),
        ("file_order", {}, "natural"),
        ("file_order", {RECORD: NEWEST.to_json()}, "name"),
    ],
)
def test_another_rule_than_the_run_began_with_is_refused_by_its_key(
    key: str, began: dict[str, Any], asked: str
) -> None:
    with pytest.raises(
        ConfigError, match=rf'^data\.{key} = "{asked}", but .* began with'
    ) as caught:
        semantics_of(config(**{key: asked}), began)
    assert caught.value.everywhere
    # In a new run, or on other data, it is what the user says.
    assert getattr(semantics_of(config(**{key: asked})), key) == asked
    assert (
        getattr(semantics_of(config(**{key: asked}, allow_data_change=True), began), key) == asked
    )
    # What the run began with may be said again.
    same = getattr(semantics_of(config(), began), key)
    assert semantics_of(config(**{key: same}), began) == semantics_of(config(), began)


def test_what_a_new_run_would_do_otherwise_is_told() -> None:
    assert older_rules(NEWEST, config()) == []
    assert older_rules(FIRST, config(file_order="name")) == [
        'the run keeps what it began with: data.decode = "none", not "cf"'
    ]
    (line,) = older_rules(FIRST, config())
    assert all(key in line for key in CHOOSABLE)


@pytest.mark.parametrize(
    ("word", "record"),
    [
        ("begun by a newer hpctrain", {**NEWEST.to_json(), "version": VERSION + 1}),
        ("damaged", {**NEWEST.to_json(), "decode": "guess"}),
        ("damaged", {**NEWEST.to_json(), "decode": ["cf"]}),
        ("damaged", {**NEWEST.to_json(), "version": "2"}),
        ("damaged", {**NEWEST.to_json(), "version": 0}),
        ("damaged", {**NEWEST.to_json(), "version": True}),
        ("damaged", {"decode": "cf"}),
        ("damaged", [1]),
        ("damaged", 0),
    ],
)
def test_a_record_that_cannot_be_followed_is_refused(word: str, record: Any) -> None:
    with pytest.raises(CheckpointError, match=word):
        semantics_of(config(), {RECORD: record})


RELEASES = sorted(
    path.parent for path in (Path(__file__).parents[2] / "data").glob("*/data") if path.is_dir()
)
AS_BEFORE = {
    "training.keep_dtype": "no module is left out of a cast, as before",
    "run.group_writable": "the folder is the user's, as before",
    "training.keep_compiled": "nothing is kept, as before",
    "training.cudnn_benchmark": "no algorithm is timed, as before",
    "checkpoint.files": "every rank writes its own file, as before",
    "checkpoint.keep_best_count": "one best checkpoint is kept, as before",
    "data.evaluations": "there are no further ones, as before",
    "training.detect_anomaly": "nothing looks at gradients, as before",
    "logging.machine": "what is trained does not know of it",
    "logging.report": "it is written once the run is complete",
    **dict.fromkeys(
        (f"notify.{key}" for key in ("command", "on", "timeout_seconds")),
        "what is trained does not know of it",
    ),
    **dict.fromkeys(
        (
            f"profile.{key}"
            for key in (
                *("active_steps", "wait_steps", "warmup_steps", "ranks", "record_shapes"),
                *("with_stack", "profile_memory", "memory_snapshot"),
            )
        ),
        "nothing is recorded, as before",
    ),
    "training.fast_dev_run": "it is no trial, as before",
    **dict.fromkeys(
        (f"early_stopping.{key}" for key in ("patience", "min_delta", "check_finite")),
        "nothing is monitored, as before",
    ),
    "training.unused_parameters": "over several ranks it is an error, as before",
    **dict.fromkeys(
        (f"data.{key}" for key in ("train_arguments", "validation_arguments", "seed_samples")),
        "no run that has begun has torch Datasets",
    ),
    "data.shuffle": "rows are shuffled, as before",
    "data.sources": "data.train is the one dataset, as before",
    "launch.prepare_timeout_seconds": "nothing of a run that has begun calls prepare_data",
}
"""Keys that came after 0.1.0, and why their default changes no run that has begun."""


@pytest.mark.parametrize("release", RELEASES, ids=lambda path: path.name)
def test_a_config_that_leaves_keys_out_means_what_it_meant(release: Path) -> None:
    """A default is still that of the release; another one takes a rule, and None as default."""
    given = (release / "ddp.toml").read_text(encoding="utf-8")
    then = tomllib.loads((release / "ddp" / "config.toml").read_text(encoding="utf-8"))
    config, mistakes = validate(parse(given, "ddp.toml"))
    assert config is not None, mistakes
    now = tomllib.loads(to_toml(config))
    changed = {
        f"{section}.{key}": (value, now[section].get(key))
        for section, keys in then.items()
        for key, value in keys.items()
        if now[section].get(key) != value and key not in tomllib.loads(given).get(section, {})
    }
    assert changed == {}
    new = {
        f"{section}.{key}"
        for section, keys in now.items()
        for key in keys.keys() - then.get(section, {}).keys()
    }
    assert new <= AS_BEFORE.keys(), "say what these do to a run that has begun, or make them rules"
