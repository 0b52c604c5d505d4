"""Components: imported, and their arguments checked against signatures."""

from __future__ import annotations

import dataclasses
import sys
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hpctrain.config import Config, load
from hpctrain.config.importing import is_reference
from hpctrain.config.registry import BUILTINS, bind, resolve, resolve_all, resolve_transform
from hpctrain.config.schema import ComponentSection
from hpctrain.errors import ConfigError

MODULES = {
    "cfg_good.py": "class Net:\n    def __init__(self, width=1): self.width = width\nnumber = 3\n",
    "cfg_fails.py": "import json\n\nNet = json.loads('{')\n",
    "cfg_exits.py": "import sys\nsys.exit(3)\n",
    "cfg_no_python.py": "x = 1\ny = = 2\n",
    "cfg_needs.py": "import cfg_not_installed\n",
    "cfg_package/__init__.py": "",
    "cfg_transforms.py": (
        "def flip(fields, keys, *, training, share=0.5): ...\n"
        "def old(images): ...\n"
        "class Crop:\n    def __init__(self, size): self.size = size\n"
    ),
}

BY_NAME = "by position only, and arguments are passed by name"


@pytest.fixture(autouse=True)
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    Path("train").mkdir()
    Path("cfg_package").mkdir()
    for name, text in MODULES.items():
        Path(name).write_text(text, encoding="utf-8")
    yield
    for name in [name for name in sys.modules if name.startswith("cfg_")]:
        del sys.modules[name]


def test_builtins_are_import_paths_of_the_component_sections() -> None:
    sections = typing.get_type_hints(Config).items()
    assert set(BUILTINS) == {name for name, kind in sections if issubclass(kind, ComponentSection)}
    assert all(is_reference(path) for names in BUILTINS.values() for path in names.values())


def test_a_component_of_the_current_directory_is_imported() -> None:
    assert resolve("model", ComponentSection(use="cfg_good:Net"))().width == 1
    assert resolve("model", ComponentSection(use="collections:OrderedDict.fromkeys"))([1]) == {
        1: None
    }


@pytest.mark.parametrize(
    ("use", "expected"),
    [
        ("cfg_absent:Net", "the current directory and Python have no module 'cfg_absent'"),
        ("cfg_package.x:Net", "the current directory and Python have no module 'cfg_package.x'"),
        ("cfg_good:Ne", "module 'cfg_good' has no 'Ne'; did you mean Net?"),
        ("cfg_good:Net.a", "module 'cfg_good' has no 'Net.a'"),
        ("cfg_good:number", "is int, which cannot be called"),
        (
            "cfg_needs:Net",
            (
                "module 'cfg_needs' is there, but fails to import: ModuleNotFoundError: "
                "No module named 'cfg_not_installed' (HERE/cfg_needs.py, line 1)"
            ),
        ),
        (
            "cfg_exits:Net",
            (
                "module 'cfg_exits' is there, but fails to import: SystemExit: 3 "
                "(HERE/cfg_exits.py, line 2)"
            ),
        ),
        (
            "cfg_no_python:Net",
            (
                "module 'cfg_no_python' is there, but fails to import: SyntaxError: invalid syntax "
                "(HERE/cfg_no_python.py, line 2)"
            ),
        ),
    ],
)
def test_what_cannot_be_imported(use: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve("model", ComponentSection(use=use))
    message = str(caught.value).replace(str(Path.cwd()), "HERE")
    assert message == f'config: 1 mistake\n  model.use = "{use}": {expected}'


def test_where_a_library_failed_is_told_too() -> None:
    with pytest.raises(ConfigError, match=r"JSONDecodeError: .*decoder\.py, line \d+\)"):
        resolve("model", ComponentSection(use="cfg_fails:Net"))


def open_ended(params: Any, /, *, lr: float, **rest: Any) -> None: ...
def closed(params: Any, lr: float, width: int, depth: int = 2, *, bias: bool = True) -> None: ...
def takes_nothing() -> None: ...


@dataclasses.dataclass(frozen=True)
class Section(ComponentSection):
    lr: float = 1.0


@pytest.mark.parametrize(
    ("target", "arguments", "given", "expected"),
    [
        (closed, {"width": 3}, ["params", "lr"], []),
        (closed, {"width": 3, "bias": False}, ["params", "lr"], []),
        (closed, {}, ["params", "lr"], ["model.width: missing; mine needs it"]),
        (
            closed,
            {"width": 1, "depht": 3, "zzz": 1},
            ["params", "lr"],
            [
                "model.depht = 3: mine has no such argument; did you mean model.depth?",
                "model.zzz = 1: mine has no such argument; it takes width, depth, bias",
            ],
        ),
        (
            closed,
            {"width": 1, "params": 3},
            ["params", "lr"],
            ["model.params = 3: hpctrain passes this argument itself"],
        ),
        (
            closed,
            {"width": 1},
            ["params", "lr", "step"],
            ["model.use = \"mine\": has to take the argument 'step', which hpctrain passes"],
        ),
        (
            open_ended,
            {"anything": 1},
            ["lr"],
            [f"model.use = \"mine\": takes 'params' {BY_NAME}"],
        ),
        (open_ended, {"anything": 1}, ["params", "lr"], []),
        (
            open_ended,
            {"params": 1, "lr": 1},
            [],
            [f"model.params = 1: mine takes this {BY_NAME}"],
        ),
        (takes_nothing, {"x": 1}, [], ["model.x = 1: mine has no such argument; it takes none"]),
        (dict, {"x": 1}, [], []),  # no signature to be had
    ],
)
def test_bind(
    target: Callable[..., Any], arguments: dict[str, Any], given: list[str], expected: list[str]
) -> None:
    component = ComponentSection(use="mine", arguments=arguments)
    assert [str(item) for item in bind("model", component, target, given=given)] == expected


def test_bind_suggests_the_sections_own_keys() -> None:
    component = Section(use="mine", arguments={"LR": 1})
    assert [str(item) for item in bind("model", component, takes_nothing)] == [
        "model.LR = 1: mine has no such argument; did you mean model.lr?"
    ]


def test_all_mistakes_of_all_components_with_their_places() -> None:
    Path("c.toml").write_text(
        '[run]\nname = "test"\n[model]\nuse = "cfg_good:Net"\nwidht = 2\n'
        '[task]\nuse = "cfg_good:Net"\ninputs = ["x"]\n[task.arguments]\ninputs = 3\n'
        '[data]\ntrain = "train"\nglobal_batch_size = 8\n'
        '[optimizer]\nuse = "cfg_good:Net"\nlr = 1\n[training]\nmax_steps = 1\n',
        encoding="utf-8",
    )
    overrides = ["scheduler.use=cfg_fails:Net", "optimizer.width=3"]
    config = load("c.toml", overrides)
    with pytest.raises(ConfigError) as caught:
        resolve_all(
            config,
            given=lambda section, _: {"task": ("inputs",)}.get(section, ()),
            path="c.toml",
            overrides=overrides,
        )
    count, *lines = str(caught.value).split("\n")
    assert count == "c.toml: 4 mistakes"
    starts = [
        "  line 5    model.widht = 2: cfg_good:Net has no such argument; did you mean model.width?",
        "  line 7    task.use = \"cfg_good:Net\": has to take the argument 'inputs', which",
        "  line 10   task.arguments.inputs = 3: hpctrain passes this argument itself",
        "  override  scheduler.use = \"cfg_fails:Net\": module 'cfg_fails' is there, but fails to",
    ]
    assert [line[: len(start)] for line, start in zip(lines, starts, strict=True)] == starts


def test_all_components_at_once() -> None:
    Path("c.toml").write_text(
        '[run]\nname = "test"\n[model]\nuse = "cfg_good:Net"\nwidth = 2\n'
        '[task]\nuse = "cfg_good:Net"\ninputs = ["x"]\n'
        '[data]\ntrain = "train"\nglobal_batch_size = 8\n'
        '[optimizer]\nuse = "cfg_good:Net"\nlr = 1\n[scheduler]\nuse = "cfg_good:Net"\n'
        "[training]\nmax_steps = 1\n",
        encoding="utf-8",
    )
    config = load("c.toml")
    targets = resolve_all(config, given=lambda section, _: {"task": ("width",)}.get(section, ()))
    assert {name: target.__name__ for name, target in targets.items()} == dict.fromkeys(
        BUILTINS, "Net"
    )
    assert targets["model"](**config.model.arguments).width == 2


@pytest.mark.parametrize(
    ("use", "arguments", "expected"),
    [
        ("cfg_transforms:flip", "{share = 0.1}", None),
        ("cfg_transforms:Crop", "{size = 3}", None),
        (
            "cfg_transforms:flip",
            "{shrae = 0.1}",
            (
                "line 6  data.transform_arguments.shrae = 0.1: cfg_transforms:flip has no such "
                "argument; did you mean data.transform_arguments.share?"
            ),
        ),
        ("cfg_transforms:Crop", "{}", "data.transform_arguments.size: missing; cfg_transforms"),
        (
            "cfg_transforms:old",
            "{}",
            "line 5  data.transform = \"cfg_transforms:old\": has to take the argument 'fields'",
        ),
    ],
)
def test_a_transform_and_its_arguments(use: str, arguments: str, expected: str | None) -> None:
    Path("c.toml").write_text(
        '[data]\ntrain = "train"\nglobal_batch_size = 8\n\n'
        f'transform = "{use}"\ntransform_arguments = {arguments}\n'
        '[run]\nname = "test"\n[model]\nuse = "cfg_good:Net"\n'
        '[task]\nuse = "cfg_good:Net"\ninputs = ["x"]\n'
        '[optimizer]\nuse = "cfg_good:Net"\nlr = 1\n[scheduler]\nuse = "cfg_good:Net"\n'
        "[training]\nmax_steps = 1\n",
        encoding="utf-8",
    )
    config = load("c.toml")

    def resolved() -> None:
        resolve_all(
            config,
            given=lambda section, _: {"task": ("width",)}.get(section, ()),
            path="c.toml",
        )

    if expected is None:
        resolved()
        target = resolve_transform(config, "transform")
        assert target is not None
        assert target.__name__ == use.partition(":")[2]
    else:
        with pytest.raises(ConfigError) as caught:
            resolved()
        assert expected in str(caught.value)
