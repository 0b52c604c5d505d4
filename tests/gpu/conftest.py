"""Tests of a device: `pytest tests/gpu`, by themselves, on a machine that has one.

`HPCTRAIN_TEST_DEVICE=cpu` passes what of them needs no device, so that they do not rot unseen.
`HPCTRAIN_TEST_RESULTS` names a file for one JSON line a test.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

DEVICE = os.environ.get("HPCTRAIN_TEST_DEVICE", "cuda")
RESULTS = os.environ.get("HPCTRAIN_TEST_RESULTS")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what there is no device for, and say so."""
    missing = pytest.mark.skip(reason="torch sees no CUDA device (pytest tests/gpu, alone)")
    of_device = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if Path(__file__).parent not in Path(item.path).parents:
            continue
        if DEVICE == "cuda" and not torch.cuda.is_available():
            item.add_marker(missing)
        elif DEVICE == "cpu" and item.get_closest_marker("on_device") is not None:
            item.add_marker(of_device)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Write a line for every test."""
    report: pytest.TestReport = yield  # type: ignore[assignment]
    if RESULTS and (report.when == "call" or report.outcome != "passed"):
        line = {
            "result": f"test {item.name}",
            "outcome": report.outcome,
            "seconds": round(report.duration, 3),
        }
        if report.failed:
            line["why"] = str(report.longrepr)[-1500:]
        with Path(RESULTS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
    return report  # type: ignore[return-value]


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The device, the first one."""
    return torch.device("cuda", 0) if DEVICE == "cuda" else torch.device("cpu")


@pytest.fixture
def waits_are_errors(device: torch.device) -> Iterator[None]:
    """Have everything that waits for the device raise."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")
