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
ENVIRONMENT = os.environ | {
    "PYTHONPATH": f"{ROOT}:{ROOT / 'benchmarks'}",
    "HPCTRAIN_TEST_DEVICE": "cpu",
    "OMP_NUM_THREADS": "1",
}


def run(*arguments: str, **variables: str) -> str:
    result = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=ENVIRONMENT | variables,
        capture_output=True,
        text=True,
        timeout=JOB_SECONDS,
        check=False,
    )
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_benchmark", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


def test_every_case_has_its_lines(benchmark: ModuleType) -> None:
    cases = [case for case in benchmark.LIMITS if "compiled" not in case]
    output = run(str(SCRIPT), *cases, "--here", "--device", "cpu", "--tiny")
    results = [json.loads(line)["result"] for line in output.splitlines()]
    assert results == [
        *("environment", "step overhead", "save", "accumulation"),
        *("cudnn.benchmark", "resnet, from device memory", "resnet, from HDF5"),
        *("transformer, from device memory", "transformer, from HDF5"),
    ]


def test_a_case_past_its_limit_has_a_line(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PYTHONPATH", ENVIRONMENT["PYTHONPATH"])
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


def test_what_tests_of_a_device_need_no_device_for_passes(tmp_path: Path) -> None:
    """Whole runs are left out: others do the same on the CPU.

    With a budget of ranks of its own: in the common one it would wait behind a test that waits for
    this one.
    """
    files = ["tests/gpu/test_delivery.py", "tests/gpu/test_steps_on_device.py"]
    output = run("-m", "pytest", "-q", "-p", "no:cacheprovider", *files, TMPDIR=str(tmp_path))
    assert "passed" in output
    assert "needs a CUDA device" in output
