"""What the README says a reader can copy."""

from __future__ import annotations

import dataclasses
import gzip
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
import typing
from pathlib import Path

import h5py
import numpy as np
import pytest
from helpers.jobs import here
from helpers.limits import JOB_SECONDS
from PIL import Image

from hpctrain.cli import main
from hpctrain.config import Config, load
from hpctrain.convert.digits import pack_digits
from hpctrain.data import open_dataset
from hpctrain.errors import ConfigError

pytestmark = pytest.mark.ranks(2)

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
        timeout=JOB_SECONDS,
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
    assert "501 samples in 2 shards" in here(site, "run.toml", "training.max_epochs=1")


def test_writing_data(site: Path) -> None:
    code = block("from hpctrain.data import Writer")
    source = "import numpy as np\ndef my_source():\n    yield np.zeros((5, 3)), np.arange(5)\n"
    (site / "write.py").write_text(source + code, encoding="utf-8")
    subprocess.run([sys.executable, "write.py"], cwd=site, check=True)
    assert (site / "data" / "train" / "index.json").exists()


def make_sources(site: Path) -> None:
    """Write the files that the commands of the README pack."""
    draw = np.random.default_rng(0)
    np.save(site / "image.npy", draw.integers(0, 255, (300, 3, 4, 4), "u1"))
    np.save(site / "label.npy", np.arange(300) % 10)
    for number in range(2):
        np.savez(site / f"run-{number}.npz", x=draw.standard_normal((20, 3)), y=np.arange(20))
    for name in ("sim.h5", "mine/a.h5", "mine/b.h5"):
        (site / name).parent.mkdir(exist_ok=True)
        with h5py.File(site / name, "w") as file:
            file["atmos/t"] = draw.standard_normal((2, 2 if "mine" in name else 30, 4))
            file["day"] = np.arange(2 if "mine" in name else 30)
    for kind in ("cat", "dog"):
        (site / "photos" / kind).mkdir(parents=True)
        for number in range(3):
            picture = Image.fromarray(draw.integers(0, 255, (9 + number, 8, 3), "u1"))
            picture.save(site / "photos" / kind / f"{number}.jpg")
    for name, magic, size in (("images-idx3", 3, (5, 4, 4)), ("labels-idx1", 1, (5,))):
        header = bytes([0, 0, 8, magic]) + np.array(size, ">u4").tobytes()
        with gzip.open(site / f"train-{name}-ubyte.gz", "wb") as compressed:
            compressed.write(header + bytes(int(np.prod(size))))
    (site / "texts").mkdir()
    (site / "texts" / "all.txt").write_text("to be or not to be\n" * 99, encoding="utf-8")


def test_dataset_tools(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_sources(site)
    commands = block("mpirun -np 4 python -m hpctrain data pack") + block(
        "python -m hpctrain data info"
    )
    for line in commands.splitlines():
        words = shlex.split(line.replace("/scratch/me", str(site / "mine")))
        program = words.index("hpctrain") + 1
        if words[0] == "mpirun":
            subprocess.run(
                [*words[:3], sys.executable, "-m", "hpctrain", *words[program:]],
                check=True,
                timeout=JOB_SECONDS,
            )
        else:
            assert main(words[program:]) == 0, (line, capsys.readouterr().err)
    told = capsys.readouterr().out
    for words_told in ("all as they should be", "of raw", "indexed 4 samples in 2 shards"):
        assert words_told in told
    for name, samples in (
        ("scans/train", 270),
        ("scans/validation", 30),
        ("runs", 40),
        ("sim", 30),
        ("photos", 6),
        ("mnist", 5),
        ("tokens", 1),
        ("parts/train", 32),
        ("fast", 30),
    ):
        assert open_dataset(f"data/{name}").samples == samples
    assert open_dataset("data/fast").slow_fields() == {}


def test_own_loop(site: Path) -> None:
    source = (
        "from torch import nn\nfrom torch.nn import functional as F\n"
        "class Net(nn.Sequential):\n"
        "    def __init__(self):\n"
        "        super().__init__(nn.Flatten(), nn.Linear(64, 10))\n"
        "def loss_of(net, batch):\n"
        '    return F.cross_entropy(net(batch["image"].float()), batch["label"].long())\n'
    )
    code = block("import torch, hpctrain").replace("data/train", "data/digits/train")
    code = code.replace("epochs=10", "epochs=1")
    (site / "loop.py").write_text(source + code, encoding="utf-8")
    result = subprocess.run(
        [sys.executable, "-m", "hpctrain", "run", "loop.py", "--np", "2"],
        cwd=site,
        capture_output=True,
        text=True,
        timeout=JOB_SECONDS,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "2 ranks on 1 node" in (site / "runs" / "mine" / "log.txt").read_text(encoding="utf-8")


def test_mistakes_look_like_that(site: Path) -> None:
    shown = block("configs/run.toml: 2 mistakes")
    config = (site / "run.toml").read_text(encoding="utf-8")
    config = config.replace("\nglobal_batch_size", "\nglobl_batch_size")
    config = re.sub(r"^lr = .*", 'lr = "fast"', config, flags=re.M)
    (site / "configs").mkdir()
    (site / "configs" / "run.toml").write_text(config, encoding="utf-8")
    with pytest.raises(ConfigError) as raised:
        load("configs/run.toml")
    # Which line it is changes with every key that the example gets.
    number = re.compile(r"line \d+")
    assert number.sub("line", str(raised.value)) == number.sub("line", shown.strip())


def test_every_key_is_in_the_example() -> None:
    """configs/run.toml says that it has every key."""
    text = (ROOT / "configs" / "run.toml").read_text(encoding="utf-8")
    sections = dict(
        re.findall(r"^(?:# )?\[\[?(\w+)\]?\][^\n]*\n(.*?)(?=^(?:# )?\[|\Z)", text, re.M | re.S)
    )
    for field in dataclasses.fields(Config):
        kind = typing.get_type_hints(Config)[field.name]
        section = kind if dataclasses.is_dataclass(kind) else typing.get_args(kind)[0]
        for item in dataclasses.fields(section):
            if item.name != "arguments":
                line = rf"^(# )?{item.name} = "
                assert re.search(line, sections[field.name], re.M), f"{field.name}.{item.name}"
