"""[data.fields] and [data.samples]: typed, checked, and saved as they were."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpctrain.config import load, to_toml
from hpctrain.config.fields import integer_fields, needed_fields, seen_fields, stored_fields
from hpctrain.config.schema import FieldTable, SamplesTable
from hpctrain.errors import ConfigError

CONFIG = """
[run]
name = "forecast"
[model]
use = "mlp"
[task]
use = "regression"
inputs = ["state"]
target = "next"
[optimizer]
use = "adamw"
lr = 1e-3
[training]
max_epochs = 1
[data]
global_batch_size = 8
train = "data/*.h5"
"""
FIELDS = """
[data.fields.state]
path = "/z500"
axis = 1
steps = 2
every = 6
[data.fields.next]
path = "/z500"
axis = 1
lead = 12
"""


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "2000.h5").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path / "run.toml"


def test_tables_become_what_the_schema_says(site: Path) -> None:
    site.write_text(CONFIG + FIELDS + "[data.samples]\nvalidation = [8000, 9000]\ntrain = '/ok'\n")
    config = load(str(site))
    assert config.data.fields == {
        "state": FieldTable(path="/z500", axis=1, steps=2, every=6),
        "next": FieldTable(path="/z500", axis=1, lead=12),
    }
    assert config.data.samples == SamplesTable(validation=(8000, 9000), train="/ok")
    saved = site.with_name("saved.toml")
    saved.write_text(to_toml(config))
    assert load(str(saved)) == config
    overridden = load(str(site), ["data.fields.next.lead=24", "data.samples.stride=6"])
    assert overridden.data.fields["next"].lead == 24
    assert overridden.data.samples.stride == 6


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("[data.fields.state]\nstpes = 2", r"data\.fields\.state\.stpes = 2: unknown key; did you"),
        ("[data.fields.state]\naxis = -1", r"line 19 .*fields\.state\.axis = -1: expected a whole"),
        ("[data.fields.state]\nsteps = 0", r"steps = 0: expected a whole number from 1"),
        ("[data.fields.state]\nevery = 2", r"every = 2: is the distance of the rows of a sample"),
        ("[data.fields.nxt]\nlead = 1", r"neither task\.inputs nor .* did you mean next\?"),
        ("[data.fields]\nstate = 3", r"data\.fields\.state = 3: expected a table"),
        ('[data.fields.state]\ntrain = "x/*.h5"', r"state\.train = .*no file fits this pattern"),
        (
            '[data.fields.state]\nvalidation = "data/*.h5"',
            r"there is no data\.validation whose rows",
        ),
        ("[data.samples]\ntrain = [5, 2]", r"expected the first row and one past the last"),
        (
            "[data.samples]\ntrain = [1, 2, 3]",
            r"expected a non-empty string or a list of 2 whole numbers",
        ),
        ("[data.samples]\nsplit_seed = 3", r"split_seed = 3: there is no validation_fraction"),
        ("[data.samples]\nvalidation_fraction = 1.0", r"expected a number above 0 and below 1"),
        (
            "[data.samples]\nvalidation_fraction = 0.1\nvalidation = [0, 5]",
            r"data\.samples\.validation says already what to evaluate with",
        ),
        (
            '[data.samples]\nvalidation_fraction = 0.1\nsplit_by = "files"\npiece_rows = 3',
            r"whole files are the pieces",
        ),
        ("[data.samples]\nsplit_by = 'file'", r'expected "rows" or "files"; did you mean "files"'),
        ("[data.samples]\nstrides = 2", r"data\.samples\.strides = 2: unknown key; did you mean"),
    ],
)
def test_mistakes(site: Path, more: str, message: str) -> None:
    site.write_text(f"{CONFIG}{more}\n")
    with pytest.raises(ConfigError, match=message):
        load(str(site))


def test_files_of_a_field_for_training_only(site: Path) -> None:
    site.write_text(
        f'{CONFIG}validation = "data/*.h5"\n[data.fields.next]\ntrain = "data/2000.h5"\n'
    )
    with pytest.raises(ConfigError, match=r"data\.fields\.next\.validation: missing; data\.valid"):
        load(str(site))


@pytest.mark.parametrize("samples", ["validation_fraction = 0.1", "validation = '/held_out'"])
def test_the_best_checkpoint_is_found_by_rows_of_the_same_files(site: Path, samples: str) -> None:
    site.write_text(f"{CONFIG}[data.samples]\n{samples}\n[checkpoint]\nkeep_best = 'loss'\n")
    assert load(str(site)).checkpoint.keep_best == "loss"


MISSING = """
[data.fields.state]
fill = 0.0
mask = "state_mask"
[data.fields.next]
fill = -1
mask = "next_mask"
decode = "cf"
"""


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('mask = "next_mask"\n', "", "data.fields.next.fill|the loss would compare with this"),
        ('"next_mask"', '"state_mask"', "the name of another field"),
        ('"next_mask"', '"next"', "the name of another field"),
        ('"next_mask"', '"state"', "the name of another field"),
        ('decode = "cf"', 'decode = "none"', "nothing is missing among numbers taken as stored"),
        ('decode = "cf"', 'decode = "integer"', 'Did you mean "integers"|did you mean "integers"'),
        ("fill = -1", 'fill = "none"', "expected a number"),
        ('"regression"', '"language_modeling"', "language_modeling takes no mask"),
    ],
)
def test_what_is_said_of_missing_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: str, new: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.h5").touch()
    path = tmp_path / "run.toml"
    path.write_text(CONFIG + MISSING)
    config = load(str(path))
    assert config.data.fields["next"] == FieldTable(fill=-1.0, mask="next_mask", decode="cf")
    assert seen_fields(config) == stored_fields(config) == ["state", "next"]
    assert needed_fields(config) == ["state", "next", "next_mask"]
    path.write_text((CONFIG + MISSING).replace(old, new))
    with pytest.raises(ConfigError, match=message):
        load(str(path))


def test_masks_among_the_inputs_are_not_read_from_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.h5").touch()
    path = tmp_path / "run.toml"
    path.write_text((CONFIG + MISSING).replace('["state"]', '["state", "state_mask"]'))
    config = load(str(path))
    assert stored_fields(config) == ["state", "next"]
    assert seen_fields(config) == ["state", "state_mask", "next"]
    assert integer_fields(config) == {"next"}
