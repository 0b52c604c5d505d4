"""What the README says a reader can copy."""

from __future__ import annotations

import dataclasses
import re
import shutil
import subprocess
import sys
import textwrap
import typing
from pathlib import Path

import h5py
import numpy as np
import pytest

from hpctrain.config import Config, load
from hpctrain.data.digits import pack_digits
from hpctrain.errors import ConfigError

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def block(first_words: str) -> str:
    """Return the indented block of the README that begins with these words."""
    blocks = re.findall(r"(?:^(?: {4}.*)?\n)+", README, re.MULTILINE)
    found = [text for text in map(textwrap.dedent, blocks) if text.strip().startswith(first_words)]
    assert len(found) == 1, first_words
    return found[0].strip() + "\n"


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    pack_digits(tmp_path / "data" / "digits")
    shutil.copy(ROOT / "configs" / "run.toml", tmp_path / "run.toml")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def train(site: Path, *arguments: str) -> str:
    result = subprocess.run(
        ["mpirun", "-np", "2", sys.executable, "-m", "hpctrain", *arguments],
        cwd=site,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


def replace_section(config: str, name: str, section: str) -> str:
    return re.sub(rf"^\[{name}\]\n.*?(?=^\[)", section + "\n", config, flags=re.M | re.S)


def test_own_model(site: Path) -> None:
    (site / "my_models.py").write_text(block("from torch import nn"), encoding="utf-8")
    config = (site / "run.toml").read_text(encoding="utf-8")
    config = replace_section(config, "model", block("[model]"))
    (site / "run.toml").write_text(config, encoding="utf-8")
    assert "my_models:Net" in train(site, "run.toml", "training.max_epochs=1")


def test_own_data(site: Path) -> None:
    """Plain HDF5 files by a pattern, of different length."""
    draw = np.random.default_rng(0)
    for number, rows in enumerate([300, 201]):
        temperature = draw.standard_normal((rows, 8, 8)).astype(np.float32)
        with h5py.File(site / f"train-{number}.h5", "w") as file:
            file["temperature"] = temperature
            file["label"] = (temperature.mean(axis=(1, 2)) > 0).astype(np.int64)
    data, task = block("[data]").split("[task]")
    config = (site / "run.toml").read_text(encoding="utf-8")
    config = re.sub(r"^train = .*", data.splitlines()[1], config, flags=re.M)
    config = config.replace("/scratch/me/", f"{site}/")
    config = re.sub(r"^(validation|keep_best|keep_best_mode) = .*\n", "", config, flags=re.M)
    config = replace_section(
        config, "task", '[task]\nuse = "classification"\n' + task.strip().replace("[task]", "")
    )
    config = replace_section(
        config, "model", '[model]\nuse = "mlp"\nin_features = 64\nout_features = 2\n'
    )
    (site / "run.toml").write_text(config, encoding="utf-8")
    assert "501 samples in 2 shards" in train(site, "run.toml", "training.max_epochs=1")


def test_writing_data(site: Path) -> None:
    code = block("from hpctrain.data import Writer")
    source = "import numpy as np\ndef my_source():\n    yield np.zeros((5, 3)), np.arange(5)\n"
    (site / "write.py").write_text(source + code, encoding="utf-8")
    subprocess.run([sys.executable, "write.py"], cwd=site, check=True)
    assert (site / "data" / "train" / "index.json").exists()


def test_own_loop(site: Path) -> None:
    code = block("import hpctrain").replace("...", "print(world.topology.world_size)")
    source = (
        "from torch import nn\nfrom torch.nn.parallel import DistributedDataParallel\n"
        "model = nn.Linear(2, 2)\n"
    )
    (site / "loop.py").write_text(source + code, encoding="utf-8")
    result = subprocess.run(
        ["mpirun", "-np", "2", sys.executable, "loop.py"],
        cwd=site,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.stdout.split() == ["2", "2"], result.stderr


def test_mistakes_look_like_that(site: Path) -> None:
    shown = block("configs/run.toml: 2 mistakes")
    config = (site / "run.toml").read_text(encoding="utf-8")
    config = config.replace("\nglobal_batch_size", "\nglobl_batch_size")
    config = re.sub(r"^lr = .*", 'lr = "fast"', config, flags=re.M)
    (site / "configs").mkdir()
    (site / "configs" / "run.toml").write_text(config, encoding="utf-8")
    with pytest.raises(ConfigError) as raised:
        load("configs/run.toml")
    assert str(raised.value) == shown.strip()


def test_every_key_is_in_the_example() -> None:
    """configs/run.toml says that it has every key."""
    text = (ROOT / "configs" / "run.toml").read_text(encoding="utf-8")
    sections = dict(re.findall(r"^\[(\w+)\]\n(.*?)(?=^\[|\Z)", text, re.M | re.S))
    for field in dataclasses.fields(Config):
        for item in dataclasses.fields(typing.get_type_hints(Config)[field.name]):
            if item.name != "arguments":
                line = rf"^(# )?{item.name} = "
                assert re.search(line, sections[field.name], re.M), f"{field.name}.{item.name}"
