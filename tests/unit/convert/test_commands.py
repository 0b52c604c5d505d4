"""The tools from the command line: what they print, their exit codes, what they do not import."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from hpctrain.cli import main
from hpctrain.data import open_dataset


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    np.save("x.npy", np.linspace(0, 1, 60, dtype="f4").reshape(20, 3))
    np.save("label.npy", np.arange(20) % 4)
    return tmp_path


def data(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    assert main(["data", *arguments]) == code
    captured = capsys.readouterr()
    return captured.err if code else captured.out


def test_one_after_the_other(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = data(
        capsys,
        *("pack", "x.npy", "label.npy", "--split", "train=0.8,validation=0.2", "all"),
        *("--shard-rows", "6", "--filter", "gzip:9", "--chunk", "1kB", "--dtype", "label=uint8"),
    )
    assert told == "all: packed train 16 samples in 3 shards, validation 4 samples in 1 shard\n"
    assert "uint8" in data(capsys, "info", "all/train")
    facts = json.loads(data(capsys, "info", "all/train", "--json", "--fields", "label"))
    assert list(facts["fields"]) == ["label"]
    told = data(capsys, "verify", "all/train", "--range", "label=0:3", "--jobs", "1")
    assert "16 samples in 3 shards" in told
    assert "all as they should be" in told
    told = data(capsys, "verify", "all/train", "--range", "label=0:2", "--jobs", "1", code=65)
    assert "all/train: " in told
    assert 'field "label", row ' in told
    assert "written to all/train/stats.json" in data(capsys, "stats", "all/train", "--jobs", "1")
    assert json.loads(Path("all/train/stats.json").read_text())["samples"] == 16
    assert "20 samples in 1 shard" not in data(capsys, "repack", "all/train", "plain")
    assert open_dataset("plain").slow_fields() == {}
    assert "packed a 8 samples" in data(capsys, "split", "plain", "parts", "--split", "a=0.5")
    speed = json.loads(data(capsys, "bench", "plain", "--batch", "4", "--seconds", "1", "--json"))
    assert speed["ratio"] > 0
    assert "of raw" in data(capsys, "bench", "plain", "--batch", "4", "--seconds", "1")


def test_index(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with h5py.File("a.h5", "w") as file:
        file["x"], file["y"] = np.arange(3), np.zeros(4)
    assert "different numbers of rows: x 3, y 4" in data(capsys, "index", "a.h5", code=65)
    told = data(capsys, "index", "a.h5", "--fields", "x", "--jobs", "1")
    assert told == ".: indexed 3 samples in 1 shard\n"
    assert json.loads(Path("index.json").read_text())["samples"] == 3


def test_many_problems_are_one_message(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data(capsys, "pack", "x.npy", "out", "--shard-rows", "1")
    for number in range(20):
        Path(f"out/shard-{number:06d}.h5").unlink()
    Path("out/more.h5").touch()
    told = data(capsys, "verify", "out", code=65)
    assert told.startswith("hpctrain: error: out: 21 problems\n  out/shard-000000.h5: this shard")
    assert told.endswith("\n  and 1 more\n")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "the following arguments are required: TOOL"),
        (["pack", "x.npy"], "the following arguments are required: folder"),
        (
            ["pack", "x.npy", "out", "--filter", "zip"],
            "--filter: zip: no such filter. There are none",
        ),
        (["pack", "x.npy", "out", "--filter", "gzip:12"], "the filter gzip has levels 0 to 9"),
        (["pack", "x.npy", "out", "--split", "a=2"], "the fractions have to be above 0"),
        (["pack", "x.npy", "out", "--shard-size", "big"], "write a size as 256MiB"),
        (["pack", "x.npy", "out", "--shard-size", "0MB"], "write a size as 256MiB"),
        (["pack", "x.npy", "out", "--shard-rows", "0"], "a whole number above 0"),
        (["pack", "x.npy", "out", "--axis", "x=one"], "write an axis as 1"),
        (["pack", "x.npy", "out", "--dtype", "x=text"], "write a dtype as label=int64"),
        (["pack", "x.npy", "out", "--size", "10"], "write rows and columns as 224x224"),
        (["pack", "x.npy", "out", "--shard-rows", "1", "--shard-size", "1"], "not allowed with"),
        (["pack", "x.npy", "out", "--seed", "-1"], "a seed is a whole number from 0"),
        (["pack", "digits", "out", "--seed", "3"], "packed in one way only"),
        (["split", "x", "out"], "required: --split"),
        (["info", "x", "--fields", "a,,b"], "write fields as image,label"),
        (["verify", "x", "--range", "label=9:0"], "write a range as label=0:9"),
        (["verify", "x", "--range", "label"], "write a range as label=0:9"),
        (["verify", "x", "--jobs", "many"], "a whole number above 0"),
        (["info", "x", "--jsn"], "unrecognized arguments: --jsn"),
    ],
)
def test_usage(
    site: Path, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    told = data(capsys, *arguments, code=64)
    assert words in told
    assert not Path("out").exists()


@pytest.mark.parametrize(
    "tool", ["pack", "split", "repack", "info", "index", "verify", "stats", "bench"]
)
def test_help(tool: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"usage: python -m hpctrain data {tool}" in data(capsys, tool, "--help")
    assert tool in data(capsys, "--help")


def test_no_tool_imports_torch_or_mpi(site: Path) -> None:
    code = """
import sys
from hpctrain.cli import main
for command in (
    "pack x.npy label.npy out", "info out", "index out", "verify out", "stats out",
    "split out parts --split a=1", "repack out again", "bench out --batch 2 --seconds 1",
):
    assert main(["data", *command.split()]) == 0, command
sys.exit(f"imported: {sorted({'torch', 'mpi4py'} & set(sys.modules))}"
         if {'torch', 'mpi4py'} & set(sys.modules) else 0)
"""
    root = str(Path(__file__).parents[3])
    script = site / "script.py"
    script.write_text(
        f"if __name__ == '__main__':\n    import sys\n    sys.path.insert(0, {root!r})\n"
        + "".join(f"    {line}\n" for line in code.strip().splitlines())
    )
    subprocess.run([sys.executable, str(script)], check=True, cwd=site)
