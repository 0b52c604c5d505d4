"""The two programs that every course of Lightning has, and two more, on one rank and on three."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.launching import ROOT
from helpers.limits import LONG_JOB_SECONDS
from helpers.runs import losses, metrics

SCRIPT = ROOT / "tests" / "programs" / "train_both.py"

pytestmark = pytest.mark.ranks(3)


@functools.cache
def trained(ranks: int, folder: Path) -> dict[str, dict[str, Any]]:
    """Run the script on so many ranks, and return what it tells."""
    launcher = ["mpirun", "-np", str(ranks)] if ranks > 1 else []
    ended = subprocess.run(
        [*launcher, sys.executable, str(SCRIPT), f"{ranks}.json"],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=LONG_JOB_SECONDS,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    found: dict[str, dict[str, Any]] = json.loads((folder / f"{ranks}.json").read_text())
    for each in found.values():
        each["losses"] = losses(folder / each["run"])
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scripts")


@pytest.mark.parametrize("ranks", [1, 3])
def test_digits(folder: Path, ranks: int) -> None:
    """Without dropout a run on several ranks is the run on one."""
    alone, found = trained(1, folder), trained(ranks, folder)
    for strategy in ("ddp", "fsdp"):
        here, there = found[f"digits {strategy}"], alone["digits ddp"]
        assert here["losses"] == pytest.approx(there["losses"], rel=1e-3)
        assert here["test"]["test_loss"] == pytest.approx(there["test"]["test_loss"], rel=0.05)
        # The loader's own batches, in its order, whichever rank predicts them.
        assert [len(batch) for batch in here["predicted"]] == [32, 32, 32]
        assert here["predicted"] == found["digits ddp"]["predicted"]


@pytest.mark.parametrize("ranks", [1, 3])
def test_language_model(folder: Path, ranks: int) -> None:
    """With dropout every rank draws its own; the global batch is the same."""
    alone, found = trained(1, folder), trained(ranks, folder)
    for strategy in ("ddp", "fsdp"):
        here, there = found[f"words {strategy}"], alone["words ddp"]
        assert len(here["losses"]) == len(there["losses"]) == 2
        assert here["losses"][0] == pytest.approx(there["losses"][0], abs=0.2)
        assert here["test"]["test_loss"] == pytest.approx(there["test"]["test_loss"], abs=0.05)


@pytest.mark.parametrize("ranks", [1, 3])
def test_graphs(folder: Path, ranks: int) -> None:
    """Samples are objects of a class of somebody's, and a rank's share may be one of them."""
    alone, found = trained(1, folder), trained(ranks, folder)
    for strategy in ("ddp", "fsdp"):
        here, there = found[f"graphs {strategy}"], alone["graphs ddp"]
        assert here["losses"] == pytest.approx(there["losses"], rel=1e-5)
        for name in ("val_auroc", "val_acc", "val_f1", "train_acc"):
            assert here["found"][name] == pytest.approx(there["found"][name], abs=1e-6)


@pytest.mark.parametrize("ranks", [1, 3])
def test_several_loaders(folder: Path, ranks: int) -> None:
    """Ranks may have no batch of one of them while others do, also where parameters are spread."""
    alone, found = trained(1, folder)["domains ddp"], trained(ranks, folder)
    for strategy in ("ddp", "fsdp"):
        here = found[f"domains {strategy}"]
        assert here["found"].keys() == alone["found"].keys()
        assert {"loss/dataloader_idx_1", "rebuilt/dataloader_idx_2"} < here["found"].keys()
        assert here["found"] == pytest.approx(alone["found"], rel=1e-5)
        assert here["tested"] == [pytest.approx(each, rel=1e-5) for each in alone["tested"]]
        assert here["predicted"] == alone["predicted"]
        assert [len(batches) for batches in here["predicted"]] == [4, 1, 4]


def test_the_program_of_the_page(tmp_path: Path) -> None:
    """As it stands, without a launcher: it begins again as the two ranks that it asks for."""
    page = (ROOT / "docs" / "from-lightning.md").read_text(encoding="utf-8")
    program = next(
        text for text in page.split("```python\n") if text.startswith("import lightning")
    )
    (tmp_path / "train.py").write_text(program.partition("```")[0], encoding="utf-8")
    ended = subprocess.run(
        [sys.executable, "train.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=LONG_JOB_SECONDS,
        check=False,
    )
    told = ended.stdout + ended.stderr
    assert ended.returncode == 0, told
    assert "world       2 ranks on 1 node" in told
    run = tmp_path / "runs" / "train" / "version_0"
    assert metrics(run, "evaluation")[-1]["val_acc"] > 0.8
    assert "validation  val_acc 0." in told
