"""What proves hpctrain on a GPU runs without one, on tiny sizes: its logic does not rot unseen."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from helpers.limits import JOB_SECONDS

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu.py"


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_benchmark", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


def test_the_script_has_a_line_for_every_result(tmp_path: Path) -> None:
    """All of it but the making of an environment and whole runs.

    With a budget of ranks of its own: in the common one its tests would wait behind this one.
    """
    lines = tmp_path / "gpu.jsonl"
    result = subprocess.run(
        ["bash", "benchmarks/gpu.sh", "dry", str(lines)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=JOB_SECONDS,
        check=False,
    )
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
    assert "needs a CUDA device" in result.stdout
    found = [json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines()]
    tests = [each for each in found if each["result"].startswith("test ")]
    assert {each["outcome"] for each in tests} == {"passed", "skipped"}
    whole, *cases = found[len(tests) :]
    assert (whole["result"], whole["failed"]) == ("tests/gpu", 0)
    assert [each["result"] for each in cases] == [
        *("environment", "step overhead", "save", "accumulation", "cudnn.benchmark"),
        *("resnet, from device memory", "resnet, from HDF5"),
        *("resnet, compiled, from device memory", "resnet, compiled, from HDF5"),
        *("transformer, from device memory", "transformer, from HDF5"),
        *("transformer, compiled, from device memory", "transformer, compiled, from HDF5"),
    ]
    # Gradients of a pass that reduces nothing lie beside DDP's buckets, until the last pass.
    assert cases[3]["beside_buckets_over_parameters"] == 1


def test_a_case_past_its_limit_has_a_line(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'benchmarks'}")
    wishes = benchmark.Wishes("cpu", True)
    assert not benchmark.run_apart("save", wishes, 1.0)
    monkeypatch.setitem(benchmark.LIMITS, "save", 0.01)
    monkeypatch.setattr(benchmark, "LEAST_SECONDS", 0.0)
    assert not benchmark.run_apart("save", wishes, 100.0)
    skipped, ended = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert skipped["outcome"] == "skipped"
    assert (ended["outcome"], ended["why"]) == ("failed", "it ran past 0 s")


def test_the_limits_fit_into_eight_minutes(benchmark: ModuleType) -> None:
    """Tests have 230 s of them at most, and take less where nothing hangs."""
    assert benchmark.TOTAL_SECONDS <= 480
    assert max(benchmark.LIMITS.values()) < 120
