"""configs/lm.toml on real text, tiny: the source of the standard library."""

from __future__ import annotations

import shutil
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from helpers.jobs import here, in_turn
from helpers.launching import ROOT
from helpers.runs import metrics
from safetensors.numpy import load_file

from hpctrain.data import Writer

pytestmark = pytest.mark.ranks(2)

TOKENS = 65
TINY = [
    *("model.context=64", "model.depth=2", "model.width=32", "model.heads=2"),
    *("logging.every_steps=1", "data.global_batch_size=16", "scheduler.warmup_steps=5"),
    *("optimizer.lr=1e-2", "run.directory=runs"),
]


@pytest.fixture
def site(tmp_path: Path) -> Path:
    library = Path(sysconfig.get_path("stdlib"))
    texts = {"train": library.glob("[a-c]*.py"), "validation": library.glob("[d-e]*.py")}
    for split, paths in texts.items():
        text = b"\0".join(path.read_bytes() for path in sorted(paths))[: 200 * 1024]
        tokens = np.frombuffer(text[: len(text) // TOKENS * TOKENS], np.uint8)
        with Writer(tmp_path / "data" / "stdlib" / split) as writer:
            writer.extend({"tokens": tokens.reshape(-1, TOKENS)})
    shutil.copy(ROOT / "configs" / "lm.toml", tmp_path / "lm.toml")
    return tmp_path


def test_a_tiny_language_model_learns_and_goes_on(site: Path) -> None:
    """With tied weights: one tensor in the checkpoint, two names in the model and the export; and
    with parameters that only one of the ranks has, from the middle on.
    """
    fsdp = [*TINY, "training.strategy=fsdp"]
    parts = [(TINY, 120), (fsdp, 140), (fsdp, 160)]
    jobs = [["lm.toml", *options, f"training.max_steps={steps}"] for options, steps in parts]
    for ended in in_turn(site, 2, *jobs):
        assert ended.code == 0, ended.output
    run = site / "runs" / "lm"
    losses = [record["loss"] for record in metrics(run, "train")]
    assert losses[0] == pytest.approx(5.5, abs=0.4)  # log 256: it knows nothing yet
    final = metrics(run, "evaluation")[-1]
    assert final["step"] == 160
    assert final["bits_per_token"] < 4.6  # single bytes of this text have 4.6 bits or so
    assert final["bits_per_token"] == pytest.approx(final["loss"] / np.log(2), rel=1e-9)

    here(site, "ckpt", "export", "runs/lm", "lm.safetensors")
    weights = load_file(site / "lm.safetensors")
    assert np.array_equal(weights["head.weight"], weights["token_embedding.weight"])
