"""docs/strategies.md says of other tools' strategies what the code does."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import tomllib
from lightning.pytorch.strategies import StrategyRegistry
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

from hpctrain.config.capabilities import Combination, unsupported
from hpctrain.config.choices import training_of
from hpctrain.config.toml import parse
from hpctrain.config.validate import validate
from hpctrain.errors import ConfigError

PAGE = Path(__file__).parents[3] / "docs" / "strategies.md"
CONFIG = """\
[run]
name = "x"
[model]
use = "mlp"
[task]
use = "regression"
inputs = ["x"]
[data]
train = "."
global_batch_size = 8
[optimizer]
use = "sgd"
lr = 0.1
[training]
max_steps = 1
"""


def tables() -> dict[str, list[tuple[str, str]]]:
    """Return the rows of each table of the section, by the beginning of its head."""
    section = PAGE.read_text(encoding="utf-8").split("## What others call it")[1]
    section = section.split("\n## ")[0]
    found: dict[str, list[tuple[str, str]]] = {}
    for block in re.findall(r"(?:^\|.*\n)+", section, re.MULTILINE):
        head, _, *rows = (line.strip("|").split(" | ") for line in block.splitlines())
        found[head[0].strip()] = [(left, right) for left, right in rows]
    return found


def keys(text: str) -> dict[str, Any]:
    """Return the keys of [training] that a cell names."""
    given: dict[str, Any] = {}
    for each in re.findall(r"`(\w+ = [^`]+)`", text):
        given = tomllib.loads(each) | given  # of several, the first
    return given


def names(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


def lightnings() -> dict[str, str]:
    """Return the cell of every name of the first table."""
    cells = {}
    plain: list[str] = []
    for left, right in tables()["Lightning, Fabric"]:
        if (found := re.search("the same with `(_\\w+)`", left)) is not None:
            for name in plain:
                if name.startswith("ddp"):
                    cells[name + found[1]] = right
        else:
            plain = plain or (names(left) if "`ddp`" in left else [])
            cells |= dict.fromkeys(names(left), right)
    return cells


def test_every_name_is_what_the_page_says() -> None:
    cells = lightnings()
    for name, cell in cells.items():
        if "refused" in cell:
            with pytest.raises(ConfigError, match=cell.split("refused: ")[1].split(";")[0].strip()):
                training_of(name)
            continue
        said = keys(cell)
        made = {"strategy": "ddp", "unused_parameters": "error"} | training_of(name)
        assert {"unused_parameters": "error"} | said == made, name
    assert len(cells) > 25


def test_lightning_knows_no_other() -> None:
    cells = lightnings()
    known = set(StrategyRegistry.available_strategies())
    assert known <= cells.keys(), known - cells.keys()


def test_every_argument_of_torchs_fsdp_is_there() -> None:
    (rows,) = (rows for head, rows in tables().items() if "FullyShardedDataParallel" in head)
    said = {name for left, _ in rows for name in names(left)}
    wanted = set(inspect.signature(FullyShardedDataParallel.__init__).parameters) - {"self"}
    assert wanted <= said, wanted - said
    assert {each.name for each in ShardingStrategy} <= said


def test_all_keys_go_together() -> None:
    count = 0
    for rows in tables().values():
        for _, cell in rows:
            if not (given := keys(cell)):
                continue
            lines = [re.search(rf"`({key} = [^`]+)`", cell)[1] for key in given]  # type: ignore[index]
            config, mistakes = validate(parse(CONFIG + "\n".join(lines), "c.toml"))
            assert config is not None, mistakes
            training = config.training
            found = unsupported(
                Combination(
                    device="cuda",
                    backend="nccl",
                    strategy=training.strategy,
                    precision=training.precision,
                    shards=bool(training.shard),
                    cpu_offload=training.cpu_offload,
                    reshard_after_forward=training.reshard_after_forward,
                    unused_parameters=training.unused_parameters,
                )
            )
            assert found is None, (cell, found)
            count += 1
    assert count > 20
