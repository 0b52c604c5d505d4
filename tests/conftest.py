"""How many ranks a test keeps busy, and room for them before it begins."""

from __future__ import annotations

import gc
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# First: netCDF4 brings plug-ins of its own for HDF5, which cannot write in h5py's.
import hdf5plugin  # noqa: F401
import pytest
from helpers.rank_budget import room_for
from helpers.rooms import belongs, room_of
from hypothesis import settings

# Examples take longer on a busy machine, which is no fault of theirs.
settings.register_profile("hpctrain", deadline=None)
settings.load_profile("hpctrain")


DRIVERS = (Path("/dev/nvidiactl"), Path("/dev/kfd"))


def pytest_configure(config: pytest.Config) -> None:
    """Have all tests compute on the CPU, where there are GPUs too, but those that are of them.

    These are run by themselves: CUDA looks once for devices. Two ranks would take the same one.
    """
    named = [Path(each.split("::")[0]).resolve() for each in config.args]
    of_devices = Path(__file__).parent / "gpu"
    alone = any(of_devices in (path, *path.parents) for path in named)
    if not alone and any(driver.exists() for driver in DRIVERS):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def ranks_of(item: pytest.Item) -> int:
    """Return the ranks that a test keeps busy at once: 0 where it starts no job.

    Among those that start jobs a parameter `ranks` says it, else the mark of test or module.

    Raises:
        pytest.UsageError: if a test among those that start jobs does not say it.
    """
    mark = item.get_closest_marker("ranks")
    if Path(item.path).parent == Path(__file__).parent / "launch":
        callspec = getattr(item, "callspec", None)
        if callspec is not None and "ranks" in callspec.params:
            return max(1, int(callspec.params["ranks"]))
        if mark is None:
            raise pytest.UsageError(
                f"{item.nodeid} starts jobs: say how many ranks at once, by a parameter `ranks` "
                "or pytest.mark.ranks(2) on it or its module"
            )
    return 0 if mark is None else int(mark.args[0])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Have every test say how many ranks it starts, before the first of them runs."""
    for item in items:
        ranks_of(item)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Have workers that take whole files take them in our order."""
    if config.getvalue("dist") != "loadfile":
        return None
    from helpers.schedule import SideBySide

    return SideBySide(config, log)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Tell a worker which room it works in."""
    if node.config.getvalue("dist") == "loadfile":
        arguments, workers = node.config.args, len(node.config.getvalue("tx"))
        node.workerinput["room"] = room_of(node.gateway.id, arguments, workers)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out the rooms of other workers."""
    room = getattr(config, "workerinput", {}).get("room")
    return None if belongs(collection_path, room) else True


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Leave tests and imported packages out of garbage collections: a second of CPU each, else."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.freeze()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Run a test, its fixtures included, when there is room; its limit counts from then."""
    with room_for(ranks_of(item)):
        return (yield)


@pytest.fixture
def disk_path() -> Iterator[Path]:
    """A folder on a disk; `tmp_path` may lie in memory, and a check warns of runs there."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


@pytest.fixture(autouse=True)
def messages_are_of_listed_types(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Have what passes between ranks be what worlds without MPI can send, on one process too."""
    if "unit" not in Path(request.path).parts or "hpctrain.launch.process_group" not in sys.modules:
        return
    from hpctrain.launch.communicators import SingleCommunicator
    from hpctrain.launch.messages import encode

    def broadcast(self: SingleCommunicator, value: Any) -> Any:
        encode(value)
        return value

    def all_gather(self: SingleCommunicator, value: Any) -> list[Any]:
        encode(value)
        return [value]

    monkeypatch.setattr(SingleCommunicator, "broadcast", broadcast)
    monkeypatch.setattr(SingleCommunicator, "all_gather", all_gather)
