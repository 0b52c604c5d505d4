"""`prepare_data` of modules and data: who calls it, for how long, and without a network."""

from __future__ import annotations

import dataclasses
import threading
import urllib.request

import pytest
import torch
from lightning.pytorch import LightningDataModule

from hpctrain.errors import DatasetError
from hpctrain.launch.communicators import SingleCommunicator
from hpctrain.launch.placement import Node, place
from hpctrain.launch.process_group import World
from hpctrain.training.prepare_data import fetching, prepare_data

NODE = [Node("boot", "n1")] * 2 + [Node("boot", "n2")]


def world(rank: int = 0) -> World:
    return World(
        topology=place(rank, NODE, launcher="none", mpi=None),
        communicator=SingleCommunicator(),
        device=torch.device("cpu"),
        backend=None,
    )


class Files(LightningDataModule):
    def __init__(self, *, per_node: bool = True) -> None:
        super().__init__()
        self.prepare_data_per_node = per_node
        self.calls = 0

    def prepare_data(self) -> None:
        self.calls += 1


@pytest.mark.parametrize(
    ("rank", "per_node", "calls"),
    [(0, True, 1), (1, True, 0), (2, True, 1), (0, False, 1), (1, False, 0), (2, False, 0)],
)
def test_one_rank_of_a_node_calls_it_or_rank_zero_alone(
    rank: int, per_node: bool, calls: int
) -> None:
    data = Files(per_node=per_node)
    prepare_data([data, None, object()], world(rank), seconds=60)
    assert data.calls == calls


def test_without_a_network_it_says_what_to_run_where(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["/site/hpctrain/__main__.py", "run.toml", "run.name=x"])

    class Download(Files):
        def prepare_data(self) -> None:
            urllib.request.urlopen("http://no-such-host.invalid/file")

    with pytest.raises(
        DatasetError, match=r"python -m hpctrain prepare run\.toml` on a login"
    ) as e:
        prepare_data([Download()], world(), seconds=60)
    assert str(e.value).startswith("no internet on ")
    assert "prepare_data of Download failed with URLError" in str(e.value)


def test_a_script_is_named_as_it_was_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["job/train.py", "--lr=1"])
    no_network = ConnectionRefusedError("no network")
    with pytest.raises(DatasetError, match=r"prepare job/train\.py`"), fetching("it"):
        raise no_network
    monkeypatch.setenv("HPCTRAIN_PREPARE", "1")
    with pytest.raises(DatasetError, match="for a node that has it"), fetching("it"):
        raise no_network


def test_another_failure_is_its_own() -> None:
    class Wrong(Files):
        def prepare_data(self) -> None:
            raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine") as caught:
        prepare_data([Wrong()], world(), seconds=60)
    assert str(caught.traceback[-1].path) == __file__  # its own line is the last


def test_one_that_does_not_end_is_named() -> None:
    end = threading.Event()

    class Hangs(Files):
        def prepare_data(self) -> None:
            end.wait()

    try:
        with pytest.raises(
            DatasetError, match="prepare_data of Hangs has not ended within 0:00:00"
        ):
            prepare_data([Hangs()], world(), seconds=0.2)
    finally:
        end.set()


def test_heartbeats_go_on_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hpctrain.training.prepare_data._TICK_SECONDS", 0.01)
    here, ticks = world(), []
    end = threading.Event()
    monkeypatch.setattr(type(here.pulse), "tick", lambda _: (ticks.append(1), end.set()))

    class Slow(Files):
        def prepare_data(self) -> None:
            assert end.wait(600)

    prepare_data([Slow()], dataclasses.replace(here), seconds=600)
    assert ticks
