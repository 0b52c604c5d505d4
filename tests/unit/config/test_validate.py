"""Every kind of mistake against the schema, with the exact words."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from hpctrain.config import Config, foreign_keys, load, to_toml
from hpctrain.config.validate import reserved_keys
from hpctrain.errors import ConfigError, ExitCode

SMALLEST = """\
[run]
name = "test"
[model]
use = "mlp"
[task]
use = "regression"
inputs = ["x"]
[data]
train = "train"
global_batch_size = 8
[optimizer]
use = "sgd"
lr = 0.1
[training]
max_steps = 5
"""

DATES = "dates and times are of no use here; as a string it needs quotes"
PRECISIONS = '"32-true", "bf16-mixed", "16-mixed", "bf16-true" or "64-true"'


@pytest.fixture(autouse=True)
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("train").mkdir()


def loaded(text: str, *overrides: str) -> Config:
    Path("c.toml").write_text(text, encoding="utf-8")
    return load("c.toml", overrides)


def mistakes(text: str, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        loaded(text, *overrides)
    assert caught.value.exit_code == ExitCode.CONFIG
    count, *lines = str(caught.value).split("\n")
    assert count == f"c.toml: {len(lines)} mistake{'s' if len(lines) > 1 else ''}"
    return [line.removeprefix("  ") for line in lines]


def test_the_smallest_config_has_every_default() -> None:
    config = loaded(SMALLEST)
    assert config.run.name == "test"
    assert config.run.seed == 1234
    assert config.task.inputs == ("x",)
    assert config.data.validation is None
    assert config.scheduler.use == "constant"
    assert config.launch.hang_timeout_seconds == 300.0


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        # Names.
        (
            'name = "test"',
            'name = "test"\nsed = 1',
            "line 3  run.sed = 1: unknown key; did you mean run.seed?",
        ),
        (
            'name = "test"',
            'name = "test"\nmax_steps = 1',
            "line 3  run.max_steps = 1: unknown key; did you mean training.max_steps?",
        ),
        ('name = "test"', 'name = "test"\nzzz = [1]', "line 3  run.zzz = [1]: unknown key"),
        (
            'name = "test"',
            'nam = "test"',
            'line 2  run.nam = "test": unknown key; did you mean run.name?',
        ),
        (
            "global_batch_size = 8",
            "globl_batch_size = 8",
            "line 10  data.globl_batch_size = 8: unknown key; did you mean data.global_batch_size?",
        ),
        (
            "lr = 0.1",
            "lR = 0.1",
            (
                "line 11  optimizer.lr: missing; expected a number above 0"
                "; is optimizer.lR a slip for it?"
            ),
        ),
        (
            "[optimizer]",
            "[optimzer]",
            "line 11  optimzer: unknown section; did you mean optimizer?",
        ),
        ("[run]", "[extra]\nx = 1\n[run]", "line 1  extra: unknown section"),
        (
            "[run]",
            "seed = 1\n[run]",
            (
                "line 1  seed = 1: stands before the first [section], so it belongs to none"
                "; did you mean run.seed?"
            ),
        ),
        (
            "[run]",
            "use = 1\n[run]",
            "line 1  use = 1: stands before the first [section], so it belongs to none",
        ),
        ("[run]", '"" = {}\n[run]', 'line 1  "": unknown section'),
        # Missing.
        ('name = "test"', "", "line 1  run.name: missing; expected a non-empty string"),
        ('[run]\nname = "test"\n', "", "run: missing section"),
        (
            "global_batch_size = 8",
            "",
            "line 8  data.global_batch_size: missing; expected a whole number from 1",
        ),
        # Types.
        (
            'name = "test"',
            "name = 3",
            "line 2  run.name = 3: expected a non-empty string; as a string it needs quotes",
        ),
        (
            'inputs = ["x"]',
            'inputs = "x"',
            'line 7  task.inputs = "x": expected a non-empty list of strings; did you mean ["x"]?',
        ),
        (
            'inputs = ["x"]',
            'inputs = ["x", 1]',
            'line 7  task.inputs = ["x", 1]: expected a non-empty list of strings',
        ),
        (
            'inputs = ["x"]',
            "inputs = []",
            "line 7  task.inputs = []: expected a non-empty list of strings",
        ),
        (
            "global_batch_size = 8",
            "global_batch_size = 8.0",
            (
                "line 10  data.global_batch_size = 8.0: expected a whole number from 1"
                "; did you mean 8?"
            ),
        ),
        (
            "global_batch_size = 8",
            "global_batch_size = true",
            "line 10  data.global_batch_size = true: expected a whole number from 1",
        ),
        (
            "global_batch_size = 8",
            'global_batch_size = "8"',
            (
                'line 10  data.global_batch_size = "8": expected a whole number from 1'
                "; without quotes it is one"
            ),
        ),
        ("lr = 0.1", 'lr = "fast"', 'line 13  optimizer.lr = "fast": expected a number above 0'),
        ("lr = 0.1", "lr = true", "line 13  optimizer.lr = true: expected a number above 0"),
        ("lr = 0.1", "lr = { a = 1 }", "line 13  optimizer.lr = {...}: expected a number above 0"),
        ("lr = 0.1", "lr.a = 1", "line 13  optimizer.lr = {...}: expected a number above 0"),
        ('[run]\nname = "test"', "run = 1", "line 1  run = 1: expected a table"),
        (
            "max_steps = 5",
            "max_steps = 5\ncompile = 1",
            "line 16  training.compile = 1: expected true or false; did you mean true?",
        ),
        (
            "max_steps = 5",
            'max_steps = 5\ncompile = "yes"',
            'line 16  training.compile = "yes": expected true or false; did you mean true?',
        ),
        (
            "max_steps = 5",
            "max_steps = 2020-01-01",
            f"line 15  training.max_steps = 2020-01-01: {DATES}",
        ),
        (
            'use = "mlp"',
            'use = "mlp"\nx = [1, [07:00:00]]',
            f"line 5  model.x = [1, [...]]: {DATES}",
        ),
        (
            'use = "mlp"',
            'use = "mlp"\narguments = 1',
            "line 5  model.arguments = 1: expected a table",
        ),
        # Ranges.
        ("lr = 0.1", "lr = 0", "line 13  optimizer.lr = 0: expected a number above 0"),
        ("lr = 0.1", "lr = nan", "line 13  optimizer.lr = nan: expected a finite number"),
        ("lr = 0.1", "lr = 1e400", "line 13  optimizer.lr = inf: expected a finite number"),
        (
            "lr = 0.1",
            "lr = 0.1\neps = -inf",
            "line 14  optimizer.eps = -inf: expected a finite number",
        ),
        (
            "global_batch_size = 8",
            "global_batch_size = 0",
            "line 10  data.global_batch_size = 0: expected a whole number from 1",
        ),
        (
            "global_batch_size = 8",
            "global_batch_size = 8\nlanes = 0",
            "line 11  data.lanes = 0: expected a whole number from 1",
        ),
        (
            "global_batch_size = 8",
            "global_batch_size = 8\nwindow = 2000",
            "line 11  data.window = 2000: expected a whole number from 1 to 1024",
        ),
        (
            'name = "test"',
            'name = "test"\nseed = -1',
            "line 3  run.seed = -1: expected a whole number from 0 to 9223372036854775807",
        ),
        (
            'name = "test"',
            'name = "test"\nseed = 9223372036854775808',
            "line 3  run.seed = 9223372036854775808: expected a number of at most 64 bits",
        ),
        (
            'use = "mlp"',
            f'use = "mlp"\nx = 0x{"f" * 6000}',
            "line 5  model.x = a very long number: expected a number of at most 64 bits",
        ),
        # Choices.
        (
            "max_steps = 5",
            'max_steps = 5\nprecision = "bf16"',
            (
                f'line 16  training.precision = "bf16": expected {PRECISIONS}'
                '; did you mean "bf16-true"?'
            ),
        ),
        (
            "max_steps = 5",
            'max_steps = 5\nstrategy = "fsd"',
            (
                'line 16  training.strategy = "fsd": expected "ddp", "fsdp" or "zero1"'
                '; did you mean "fsdp"?'
            ),
        ),
        (
            "max_steps = 5",
            "max_steps = 5\nprecision = 32",
            f"line 16  training.precision = 32: expected {PRECISIONS}",
        ),
        # Arguments of a component.
        (
            'use = "mlp"',
            'use = "mlp"\nx = 1\n[model.arguments]\nx = 2',
            "line 5  model.x = 1: given twice, also in [model.arguments]",
        ),
        # Several at once, by line.
        (
            'name = "test"\n',
            'name = ""\nzzz = 1\n',
            'line 2  run.name = "": expected a non-empty string\nline 3  run.zzz = 1: unknown key',
        ),
    ],
)
def test_mistakes(old: str, new: str, expected: str) -> None:
    assert old in SMALLEST
    assert mistakes(SMALLEST.replace(old, new, 1)) == expected.split("\n")


def test_a_mistake_in_an_override_names_it_and_spares_the_file() -> None:
    text = SMALLEST.replace("lr = 0.1", 'lr = "fast"')
    assert loaded(text, "optimizer.lr=2e-3").optimizer.lr == 2e-3
    assert mistakes(SMALLEST, "training.compile=True", "optimizer.lr=fast", "run.seed=[1") == [
        'override  training.compile = "True": expected true or false; did you mean true?',
        'override  optimizer.lr = "fast": expected a number above 0',
        "override  run.seed=[1: not a TOML value: Unclosed array",
    ]


def test_a_dotted_key_is_a_section_as_well() -> None:
    assert loaded(SMALLEST.replace("[run]\nname", "run.name")) == loaded(SMALLEST)


def test_further_keys_of_a_component_become_its_arguments() -> None:
    config = loaded(
        SMALLEST.replace('"mlp"', '"mlp"\nwidth = 3\ndeep.x = [1]\n[model.arguments]\nuse = 1.0'),
        "optimizer.betas=[0.9,0.99]",
        "model.arguments.more='a'",
    )
    assert config.model.arguments == {"width": 3, "deep": {"x": [1]}, "use": 1.0, "more": "a"}
    assert config.optimizer.arguments == {"betas": [0.9, 0.99]}


def test_a_whole_number_may_stand_for_a_number_and_nothing_else_is_coerced() -> None:
    config = loaded(SMALLEST.replace("lr = 0.1", "lr = 1"), "model.x=1", "model.y=1.0")
    assert type(config.optimizer.lr) is float
    assert [type(value) for value in config.model.arguments.values()] == [int, float]


def test_a_mistake_is_told_without_anything_heavy() -> None:
    Path("c.toml").write_text(SMALLEST.replace("0.1", '"fast"'), encoding="utf-8")
    code = (
        "import sys\n"
        "from hpctrain.config import load\n"
        "from hpctrain.errors import ConfigError\n"
        "try: load('c.toml')\n"
        "except ConfigError as error: print(error)\n"
        "print(*{'torch', 'numpy', 'h5py', 'mpi4py'} & set(sys.modules))\n"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    message = 'c.toml: 1 mistake\n  line 13  optimizer.lr = "fast": expected a number above 0'
    assert told.stdout == f"{message}\n\n"
    assert told.stderr == ""


CALLBACKS = """
[[callbacks]]
use = "collections:OrderedDict"
decay = 0.9
[callbacks.arguments]
use = 3

[[callbacks]]
use = "collections:Counter"
"""


def test_callbacks_are_tables_with_arguments_of_their_own() -> None:
    Path("c.toml").write_text(SMALLEST + CALLBACKS, encoding="utf-8")
    config = load("c.toml")
    assert [(each.use, each.arguments) for each in config.callbacks] == [
        ("collections:OrderedDict", {"decay": 0.9, "use": 3}),
        ("collections:Counter", {}),
    ]
    Path("c.toml").write_text(to_toml(config), encoding="utf-8")
    assert load("c.toml") == config


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[[callbacks]]\ndecay = 1\n", "callbacks.use: missing"),
        ("[[callbacks]]\nuse = 1\n", "callbacks.use = 1: expected a non-empty string"),
        ('[[callbacks]]\nuse = "Counter"\n', 'expected "package.module:Name"'),
        ('[[callbacks]]\nuse = "fractions:Fracton"\n', "did you mean Fraction"),
        ('[callbacks]\nuse = "collections:Counter"\n', "expected a list of tables"),
        ("[[callbacks]]\nuse = 'a:b'\nx = 1\n[callbacks.arguments]\nx = 2\n", "given twice"),
    ],
)
def test_what_is_wrong_with_a_callback_is_told(text: str, told: str) -> None:
    Path("c.toml").write_text(SMALLEST + text, encoding="utf-8")
    with pytest.raises(ConfigError, match=re.escape(told)):
        load("c.toml")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("training.epochs", "did you mean training.max_epochs?"),
        ("training.learning-rate", "did you mean optimizer.lr?"),
        ("training.lr", "did you mean optimizer.lr?"),
        ("training.fp16", "did you mean training.precision?"),
        ("training.gradient_clip_val", "did you mean training.clip_norm?"),
        ("training.gradient_accumulation_steps", "data.micro_batch_size makes several passes"),
        ("training.devices", "the launcher decides on the ranks"),
        ("data.batch_size", "did you mean data.global_batch_size?"),
        ("data.pin_memory", "samples are read ahead"),
        ("checkpoint.monitor", "did you mean checkpoint.keep_best?"),
        ("checkpoint.save_top_k", "did you mean checkpoint.keep_best_count?"),
        ("logging.wandb", "[[trackers]]"),
        ("trainer.max_epochs", "unknown section; did you mean training?"),
        ("wandb.project", "unknown section; [[trackers]]"),
    ],
)
def test_keys_of_others_name_ours(given: str, said: str) -> None:
    with pytest.raises(ConfigError) as raised:
        loaded(SMALLEST, f"{given}=1")
    assert said in str(raised.value)


def test_every_key_that_is_meant_is_there() -> None:
    """And names of others are none of ours in its section, where they would never be asked."""
    for ours, names in foreign_keys._KEYS.items():
        section, key = ours.split(".")
        assert key in reserved_keys(section) or ours == "optimizer.weight_decay"
        for name in names.split():
            place = name if "." in name else f"{section}.{name}"
            assert place == ours or place.split(".")[1] not in reserved_keys(section), place
    assert all(reserved_keys(section) for section in foreign_keys._SECTIONS)


@pytest.mark.parametrize(
    ("ours", "theirs", "told"),
    [
        ("global_batch_size", "batch_size", "did you mean data.global_batch_size?"),
        ("lr =", "learning_rate =", "is optimizer.learning_rate a slip for it?"),
        ('use = "mlp"', 'name = "mlp"', "is model.name a slip for it?"),
        ("[optimizer]", "[optim]", "did you mean optimizer?"),
    ],
)
def test_a_key_of_others_in_place_of_ours_is_one_mistake(ours: str, theirs: str, told: str) -> None:
    with pytest.raises(ConfigError) as raised:
        loaded(SMALLEST.replace(ours, theirs))
    assert told in str(raised.value)
    assert str(raised.value).startswith("c.toml: 1 mistake\n")


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("optimizer.lr=.5", "did you mean 0.5?"),
        ('optimizer.lr="1e-3"', "without quotes it is one"),
        ("training.max_steps=1e3", "did you mean 1000?"),
        ('training.max_steps="1e3"', "did you mean 1000?"),
        ("training.max_steps=007", "did you mean 7?"),
        ("training.compile=1", "did you mean true?"),
        ("training.clip_norm=None", "TOML has no null: leave the key out"),
        ("task.inputs=x, y", 'did you mean ["x", "y"]?'),
        ("task.inputs=[x]", "strings inside of it need quotes"),
        ("run.name=1", "as a string it needs quotes"),
        ("run.directory=~/runs", "are not expanded here"),
        ("run.directory=$SCRATCH/runs", "are not expanded here"),
        ("epochs=3", "expected SECTION.KEY=VALUE; did you mean training.max_epochs?"),
        ("lr=0.1", "expected SECTION.KEY=VALUE; did you mean optimizer.lr?"),
        ('data.fields."a b".path=/x', 'data.fields."a b"'),
    ],
)
def test_what_was_perhaps_meant(override: str, told: str) -> None:
    with pytest.raises(ConfigError) as raised:
        loaded(SMALLEST, override)
    assert told in str(raised.value)
    assert "1 mistake\n" in str(raised.value)


def test_times_and_dates_on_a_command_line_are_words() -> None:
    config = loaded(SMALLEST, "job.time=10:00:00", "run.name=2026-01-31", "training.max_steps=1_0")
    assert (config.job.time, config.run.name) == ("10:00:00", "2026-01-31")
    assert config.training.max_steps == 10
