"""What no schema can say of a config is found, with the line and what would be right."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpctrain.config import load, to_toml
from hpctrain.config.fields import integer_fields, needed_fields, seen_fields, stored_fields
from hpctrain.config.rules import CHECKS
from hpctrain.config.schema_data import FieldTable, SamplesTable
from hpctrain.config.toml import apply_overrides, parse
from hpctrain.errors import ConfigError

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
                '"adamw", "module", "nadam", "radam", "rmsprop", "sgd", '
                f'{IMPORT}; did you mean "torch.optim:SGD"?'
            ),
        ),
        (
            "task.use=a:b:c",
            (
                'task.use = "a:b:c": expected "classification", "language_modeling", '
                f'"module", "regression", {IMPORT}'
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
        ("data.weights=meta/weight", None),
        ("data.weights=w.npy", f'data.weights = "w.npy": {ABSENT}'),
        ("data.weights=w/a.h5:x", f'data.weights = "w/a.h5:x": {ABSENT}'),
        ("data.weights=shards/*.h5:x", None),
        (
            "data.epoch_samples=9",
            (
                "data.epoch_samples = 9: is the length of an epoch that is drawn by data.weights, "
                "or mixed of data.sources, and neither is set; training.limit_train_batches ends "
                "any epoch earlier"
            ),
        ),
    ],
)
def test_one_mistake(override: str, expected: str | None) -> None:
    assert told(VALID, override) == ([] if expected is None else [expected])


SOURCES = '[{name = "a", train = "shards", weight = 1}, {name = "b", train = "shards", weight = 3}]'


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (None, None),
        (('"b"', '"a"'), 'data.sources.name = "a": another source has this name'),
        (('"b"', '"b/c"'), 'data.sources.name = "b/c": expected a plain name'),
        ((", weight = 1", ""), "data.sources = [{...}, {...}]: some have a weight and some have"),
        (("3}", '0, when_exhausted = "drop"}'), None),
        (("1}", '1, when_exhausted = "drop"}'), None),
        (
            ('"shards", weight = 1', '"none", weight = 1'),
            'data.sources.train = "none": no such file',
        ),
        (('"shards", weight = 1', '"m:D", weight = 1'), "sources are HDF5 files: pack the Dataset"),
        (("weight = 1", "weight = 1, samples = [9, 3]"), "data.sources.samples = [9, 3]: expected"),
    ],
)
def test_sources_to_mix(change: tuple[str, str] | None, expected: str | None) -> None:
    sources = SOURCES if change is None else SOURCES.replace(*change, 1)
    found = told(VALID, f"data.sources={sources}", 'data.train=""')
    if expected is None:
        assert found == []
    else:
        assert len(found) == 1, found
        assert expected in found[0]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("data.epoch_samples=9", None),
        ("data.train=shards", 'data.train = "shards": data.sources name the files to train with'),
        ("data.weights=w", 'data.weights = "w": draws single samples by weight, and data.sources'),
        (
            "data.normalize.image=stats",
            'data.normalize.image = "stats": no statistics are of a mix',
        ),
    ],
)
def test_what_goes_with_sources(override: str, expected: str | None) -> None:
    found = told(VALID, f"data.sources={SOURCES}", 'data.train=""', override)
    if expected is None:
        assert found == []
    else:
        assert len(found) == 1, found
        assert expected in found[0]


def test_sources_of_which_none_lasts() -> None:
    sources = SOURCES.replace("}", ', when_exhausted = "drop"}')
    assert (
        "training would run out of samples"
        in told(VALID, f"data.sources={sources}", 'data.train=""')[0]
    )


def test_one_order_of_the_samples() -> None:
    (both,) = told(VALID, "data.weights=w", "data.shuffle=false")
    assert both.startswith("data.shuffle = false: data.weights draws the samples in an order of")
    overfit = ["training.overfit_batches=2", "training.limit_train_batches=0.5"]
    first, second = told(VALID, "data.weights=w", *overfit)
    assert first.endswith("first batches in the dataset's order, and data.weights draws others")
    assert second.endswith("and evaluation alike, and training.limit_train_batches is set too")


def test_no_end() -> None:
    assert told(VALID.replace("max_steps = 5", "compile = false")) == [
        "training: no end: set max_epochs, max_steps or max_samples"
    ]


def test_the_best_of_no_evaluations() -> None:
    assert told(VALID.replace("validation", "window")) == [
        'checkpoint.keep_best = "loss": needs evaluations, and data.validation is not set'
    ]


def test_a_checkpoint_has_five_files_at_least() -> None:
    assert told(VALID, "checkpoint.files=5") == told(VALID, "checkpoint.files=0") == []
    (found,) = told(VALID, "checkpoint.files=4")
    assert found == (
        "checkpoint.files = 4: a checkpoint of one writer has 5 files: 5 or more, or 0"
    )


def test_early_stopping_has_something_to_go_by() -> None:
    assert told(VALID, "early_stopping.monitor=loss", "early_stopping.mode=min") == []
    (alone,) = told(VALID, "early_stopping.patience=5")
    assert alone.startswith("early_stopping.patience = 5: there is no early_stopping.monitor")
    assert told(VALID, "early_stopping.patience=3") == []  # as a saved config has it
    for override, message in [
        ("training.evaluate_every_epochs=0", "training.evaluate_every_epochs = 0 makes none"),
        ("training.min_steps=9", "training.min_steps = 9: more than training.max_steps = 5"),
    ]:
        (found,) = told(VALID, "early_stopping.monitor=loss", override)
        assert message in found
    modes = ["early_stopping.mode=max", "checkpoint.keep_best_mode=min"]
    (found,) = told(VALID, "early_stopping.monitor=loss", *modes)
    assert found.endswith('the same metric has checkpoint.keep_best_mode = "min"')
    without = VALID.replace('validation = "shards/*.h5"', "")
    assert [each.split(" = ")[0] for each in told(without, "early_stopping.monitor=loss")] == [
        "checkpoint.keep_best",
        "early_stopping.monitor",
    ]


def test_further_data_to_evaluate_with() -> None:
    for override, message in [
        ("data.evaluations.other=train", None),
        ("data.evaluations.other=nix", 'data.evaluations.other = "nix": no such file or folder'),
        ("data.evaluations.test=train", "expected a plain name: letters, digits and"),
        ("data.evaluations={'a/b'='train'}", "expected a plain name: letters, digits and"),
    ]:
        found = told(VALID, override)
        assert (len(found), message or "") == (message is not None, message or "")
        assert message is None or message in found[0]
    text = VALID.replace('validation = "shards/*.h5"', "").replace('keep_best = "loss"', "")
    (found,) = told(text, "data.evaluations.other=train")
    assert "and data.validation is not set" in found


def test_what_is_profiled() -> None:
    assert told(VALID, "profile.active_steps=2", "profile.ranks=[0,1]") == []
    assert told(VALID, "profile.ranks=[0]") == []  # as a saved config has it
    (found,) = told(VALID, "profile.with_stack=true")
    assert "there is no profile.active_steps beside it" in found
    snapshot = ["profile.active_steps=2", "profile.memory_snapshot=true", "launch.device=cpu"]
    (found,) = told(VALID, *snapshot)
    assert found.endswith('only CUDA\'s memory has a history, and launch.device = "cpu"')


def test_anomalies_cannot_be_seen_in_cuda_graphs() -> None:
    graphs = ["training.compile=true", 'training.compile_mode="reduce-overhead"']
    assert told(VALID, *graphs) == told(VALID, "training.detect_anomaly=true") == []
    (found,) = told(VALID, *graphs, "training.detect_anomaly=true")
    assert 'training.compile_mode = "reduce-overhead" records them' in found


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
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "2000.h5").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path / "run.toml"


def test_tables_become_what_the_schema_says(file: Path) -> None:
    file.write_text(CONFIG + FIELDS + "[data.samples]\nvalidation = [8000, 9000]\ntrain = '/ok'\n")
    config = load(str(file))
    assert config.data.fields == {
        "state": FieldTable(path="/z500", axis=1, steps=2, every=6),
        "next": FieldTable(path="/z500", axis=1, lead=12),
    }
    assert config.data.samples == SamplesTable(validation=(8000, 9000), train="/ok")
    saved = file.with_name("saved.toml")
    saved.write_text(to_toml(config))
    assert load(str(saved)) == config
    images = ['data.fields.state={offsets="ptr", image=[8, 9]}']
    saved.write_text(to_toml(load(str(file), images)))
    assert load(str(saved)).data.fields["state"].image == (8, 9)
    saved.write_text(to_toml(load(str(file), ['data.fields.state={path="X", sparse="csr"}'])))
    assert load(str(saved)).data.fields["state"].sparse == "csr"
    by_date = [
        "data.samples.train={time=['1979','2015-12-31']}",
        "data.fields.state={static=true, select={latitude=[[30,60],70]}}",
        "data.fields.next.weight=cos_latitude",
    ]
    saved.write_text(to_toml(load(str(file), by_date)))
    again = load(str(saved))
    assert again == load(str(file), by_date)
    assert again.data.samples.train == {"time": ["1979", "2015-12-31"]}
    assert again.data.fields["state"].select == {"latitude": [[30, 60], 70]}
    overridden = load(str(file), ["data.fields.next.lead=24", "data.samples.stride=6"])
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
        (
            '[data.fields.state]\naxis = "none"\nbatch = "pad"',
            r'state\.batch = .*: is of rows, and with axis = "none" an array is one sample',
        ),
        ('[data.fields.state]\naxis = "nine"', r'axis = "nine": expected'),
        (
            '[data.fields.state]\nattribute = "year"\nsteps = 2',
            r"state\.steps = 2: is of rows, and this field is an attribute, one value for each",
        ),
        (
            '[data.fields.state]\nsparse = "dense"\nsteps = 2',
            r"state\.steps = 2: is not for the rows of a sparse matrix",
        ),
        (
            '[data.fields.state]\nsparse = "csr"\n[data.normalize]\nstate = {mean = 1.0}',
            r"normalize\.state = .*: would change the values of a sparse matrix",
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
        *(
            (
                f"[data.samples]\ntrain = {rows}",
                r"train = .*: expected the first and the last value",
            )
            for rows in (
                "{}",
                "{time = '1979'}",
                "{time = ['1979']}",
                "{time = ['', '']}",
                "{time = [['1979', '1980'], '1981']}",
                "{time = [true, 1]}",
            )
        ),
        (
            "[data.samples]\ntrain = {time = [1979-01-01, 2000-01-01]}",
            r"as a string it needs quotes",
        ),
        ("[data.fields.state]\nstatic = true\nlead = 1", r"lead = 1: is of rows or values of sam"),
        ("[data.fields.next]\nstatic = true", r"next\.static = true: the target is of samples"),
        ("[data.fields.next]\nweight = 'sin'", r'weight = "sin": expected "cos_latitude" or "cell'),
        ("[data.fields.state]\nselect = {y = [[1]]}", r"latitude = \[\[30, 60\]\]"),
        ("[data.samples]\nsplit_by = 'file'", r'expected "rows" or "files"; did you mean "files"'),
        ("[data.samples]\nstrides = 2", r"data\.samples\.strides = 2: unknown key; did you mean"),
    ],
)
def test_mistakes(file: Path, more: str, message: str) -> None:
    file.write_text(f"{CONFIG}{more}\n")
    with pytest.raises(ConfigError, match=message):
        load(str(file))


def test_files_of_a_field_for_training_only(file: Path) -> None:
    file.write_text(
        f'{CONFIG}validation = "data/*.h5"\n[data.fields.next]\ntrain = "data/2000.h5"\n'
    )
    with pytest.raises(ConfigError, match=r"data\.fields\.next\.validation: missing; data\.valid"):
        load(str(file))


@pytest.mark.parametrize("samples", ["validation_fraction = 0.1", "validation = '/held_out'"])
def test_the_best_checkpoint_is_found_by_rows_of_the_same_files(file: Path, samples: str) -> None:
    file.write_text(f"{CONFIG}[data.samples]\n{samples}\n[checkpoint]\nkeep_best = 'loss'\n")
    assert load(str(file)).checkpoint.keep_best == "loss"


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
