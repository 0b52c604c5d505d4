"""What contradicts itself, and what is not there: with the exact words."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpctrain.config.rules import CHECKS
from hpctrain.config.toml import apply_overrides, parse

VALID = """\
[run]
name = "test"
[model]
use = "mlp"
[task]
use = "regression"
[data]
train = "train"
validation = "shards/*.h5"
global_batch_size = 8
micro_batch_size = 8
[optimizer]
use = "sgd"
[training]
max_steps = 5
[checkpoint]
keep_best = "loss"
"""


ABSENT = "no such file or folder (seen from HERE)"
FOLDER = "expected a plain folder name: letters, digits and . _ + = -, at most 200"
IMPORT = 'or an import path "package.module:Name"'


@pytest.fixture(autouse=True)
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("train", "shards", "od[d]", "checkpoints/step-00000001"):
        Path(folder).mkdir(parents=True)
    for file in ("shards/0.h5", "plain"):
        Path(file).touch()


def told(text: str, *overrides: str) -> list[str]:
    source = parse(text, "c.toml")
    assert not apply_overrides(source, overrides)
    here = str(Path.cwd())
    return [str(mistake).replace(here, "HERE") for check in CHECKS for mistake in check(source)]


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ['data.train="od[d]"'],
        ["data.train=shards/0.h5"],
        ["data.train=**/*.h5"],
        ["checkpoint.resume=never"],
        ["checkpoint.resume=checkpoints/step-00000001"],
        ["launch.device=cpu", "launch.backend=gloo", "training.precision=16-mixed"],
        ["optimizer.use=collections:OrderedDict"],
        ["run.directory=checkpoints/new", "run.name=a-b_c.d+e=f"],
        # Of the wrong type: the schema speaks.
        [
            "run.name=1",
            "run.directory=[]",
            "data.train=1",
            "model.use=1",
            "data.micro_batch_size=x",
        ],
        ["run.name={}", "training.max_steps=[]", "launch.backend=1", "checkpoint.resume=1"],
    ],
)
def test_nothing_to_tell(overrides: list[str]) -> None:
    assert told(VALID, *overrides) == []


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("run.name=../x", f'run.name = "../x": {FOLDER}'),
        ("run.name=..", f'run.name = "..": {FOLDER}'),
        ("run.name='a b'", f'run.name = "a b": {FOLDER}'),
        ("run.directory=plain", 'run.directory = "plain": plain is a file, and has to be a folder'),
        ("run.directory=plain/x", None),
        ("run.directory='.'", None),
        (
            'run.directory="a\\u0000b"',
            'run.directory = "a\\x00b": has characters that no folder should have in its name',
        ),
        ("data.train=trian", f'data.train = "trian": {ABSENT}'),
        (
            "data.train=shards/*.hdf5",
            'data.train = "shards/*.hdf5": no file fits this pattern (seen from HERE)',
        ),
        (
            "data.train=$SCRATCH/x",
            f'data.train = "$SCRATCH/x": {ABSENT}; ~ and $NAMES are not expanded here',
        ),
        ("data.train=~/x", f'data.train = "~/x": {ABSENT}; ~ and $NAMES are not expanded here'),
        (
            "data.train=data/digits/train",
            (
                f'data.train = "data/digits/train": {ABSENT}'
                "; `python -m hpctrain data pack digits data/digits` makes it"
            ),
        ),
        ('data.train="a\\u0000b"', f'data.train = "a\\x00b": {ABSENT}'),
        ("data.validation=x", f'data.validation = "x": {ABSENT}'),
        ("checkpoint.resume=atuo", f'checkpoint.resume = "atuo": {ABSENT}; did you mean "auto"?'),
        ("checkpoint.resume=shards/*", f'checkpoint.resume = "shards/*": {ABSENT}'),
        (
            "model.use=convnt",
            (
                'model.use = "convnt": expected "convnet", "mlp", "resnet18", "resnet20", '
                f'"resnet50", "transformer", {IMPORT}; did you mean "convnet"?'
            ),
        ),
        (
            "optimizer.use=torch.optim.SGD",
            (
                'optimizer.use = "torch.optim.SGD": expected "adafactor", "adagrad", "adam", '
                '"adamw", "nadam", "radam", "rmsprop", "sgd", '
                f'{IMPORT}; did you mean "torch.optim:SGD"?'
            ),
        ),
        (
            "task.use=a:b:c",
            (
                'task.use = "a:b:c": expected "classification", "language_modeling", '
                f'"regression", {IMPORT}'
            ),
        ),
        (
            "scheduler.use=hpctrain.errors:ConfigErorr",
            (
                "scheduler.use = \"hpctrain.errors:ConfigErorr\": module 'hpctrain.errors' has no "
                "'ConfigErorr'; did you mean ConfigError?"
            ),
        ),
        (
            "data.micro_batch_size=9",
            (
                "data.micro_batch_size = 9: more than data.global_batch_size = 8, "
                "which all ranks share"
            ),
        ),
    ],
)
def test_one_mistake(override: str, expected: str | None) -> None:
    assert told(VALID, override) == ([] if expected is None else [expected])


def test_no_end() -> None:
    assert told(VALID.replace("max_steps = 5", "compile = false")) == [
        "training: no end: set max_epochs, max_steps or max_samples"
    ]


def test_the_best_of_no_evaluations() -> None:
    assert told(VALID.replace("validation", "window")) == [
        'checkpoint.keep_best = "loss": needs evaluations, and data.validation is not set'
    ]


def test_nccl_without_gpus() -> None:
    assert told(VALID, "launch.device=cpu", "launch.backend=nccl") == [
        'launch.backend = "nccl": NCCL carries nothing between CPUs; "gloo" does'
    ]


def test_the_fastest_kernel_and_the_same_bits() -> None:
    asked = "training.cudnn_benchmark=true"
    assert told(VALID, asked) == []
    (line,) = told(VALID, asked, "run.deterministic=true")
    assert line == (
        "training.cudnn_benchmark = true: the fastest algorithm may be another one next time, and "
        "run.deterministic = true asks for equal bits"
    )


def test_a_run_folder_in_the_way(tmp_path: Path) -> None:
    assert told(VALID, "run.directory=.", "run.name=plain") == [
        'run.name = "plain": plain is a file, and has to be a folder'
    ]


EXPECTED = 'expected "stats", "channel_stats", or a table with mean and std'


@pytest.mark.parametrize(
    ("normalize", "expected"),
    [
        ('{x = "stats", y = "channel_stats"}', []),
        ("{x = {mean = 3, std = [1, 2.5]}, y = {std = 4}}", []),
        (
            '{xx = "stats"}',
            [
                (
                    'data.normalize.xx = "stats": neither task.inputs nor task.target has this '
                    "field; did you mean x?"
                )
            ],
        ),
        (
            '{x = "stat"}',
            [f'data.normalize.x = "stat": {EXPECTED}; did you mean "stats"?'],
        ),
        ("{x = 3}", [f"data.normalize.x = 3: {EXPECTED}"]),
        ("{x = {}}", [f"data.normalize.x = {{}}: {EXPECTED}"]),
        (
            "{x = {mean = 1, sdt = 2}}",
            [
                "data.normalize.x.sdt = 2: unknown key; did you mean std?; there are mean and std",
            ],
        ),
        (
            "{x = {std = 0}}",
            [
                (
                    "data.normalize.x.std = 0: expected a number above 0, or a list of them, "
                    "one a channel"
                ),
            ],
        ),
        (
            "{x = {std = [1, -2]}}",
            [
                (
                    "data.normalize.x.std = [1, -2]: expected a number above 0, or a list of them, "
                    "one a channel"
                ),
            ],
        ),
        (
            '{x = {mean = "0", std = []}}',
            [
                'data.normalize.x.mean = "0": expected a number, or a list of them, one a channel',
                (
                    "data.normalize.x.std = []: expected a number above 0, or a list of them, "
                    "one a channel"
                ),
            ],
        ),
        (
            "{x = {mean = [1, 2], std = [1, 2, 3]}}",
            [
                "data.normalize.x.std = [1, 2, 3]: mean and std are lists of different length",
            ],
        ),
    ],
)
def test_normalize(normalize: str, expected: list[str]) -> None:
    overrides = ['task.inputs=["x"]', "task.target=y", f"data.normalize={normalize}"]
    assert told(VALID, *overrides) == expected


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("data.transform=collections:OrderedDict", []),
        (
            "data.transform=collections.OrderedDict",
            [
                (
                    'data.transform = "collections.OrderedDict": expected an import path '
                    '"package.module:Name"'
                )
            ],
        ),
        (
            "data.transform=hpctrain.errors:ConfigErorr",
            [
                (
                    "data.transform = \"hpctrain.errors:ConfigErorr\": module 'hpctrain.errors' "
                    "has no 'ConfigErorr'; did you mean ConfigError?"
                )
            ],
        ),
        (
            "data.sample_transform=collections",
            [
                (
                    'data.sample_transform = "collections": expected an import path '
                    '"package.module:Name"'
                )
            ],
        ),
        (
            "data.transform_arguments={a = 1}",
            ["data.transform_arguments = {...}: there is no data.transform that would take them"],
        ),
    ],
)
def test_transform(override: str, expected: list[str]) -> None:
    assert told(VALID, override) == expected
