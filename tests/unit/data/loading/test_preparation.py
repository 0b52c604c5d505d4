"""Single samples through a user's transform: threads and processes, one order, the same bits."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import xxhash
from helpers.loaders import evaluation_loader, train_loader
from helpers.waiting import wait_for

from hpctrain.data import Writer, open_dataset
from hpctrain.data.dataset import Dataset
from hpctrain.data.loading.loader import TrainLoader
from hpctrain.data.loading.prefetch import MemoryPlan
from hpctrain.data.loading.preparation import SamplePreparation
from hpctrain.data.loading.worker_pool import WorkerPool
from hpctrain.data.order.order import Order
from hpctrain.errors import TrainingError

CPU = torch.device("cpu")
SAMPLES = 203
IMAGES = np.random.default_rng(0).integers(0, 256, (SAMPLES, 3, 6, 6), np.uint8)
ORDERS = [
    Order(samples=SAMPLES, seed=3, lanes=8, window=4, block_rows=1),
    Order(samples=SAMPLES, seed=3, lanes=8, window=2, block_rows=6),
]
MODULE = """
import os, signal, time
import numpy as np

def crop(fields, generator, *, training, size=4):
    top, left = generator.integers(0, 7 - size, 2) if training else (1, 1)
    image = fields["image"][:, top : top + size, left : left + size].astype(np.float32)
    fields["image"] = image + generator.normal(size=image.shape).astype(np.float32)
    fields["crop"] = np.array([top, left])
    return fields

class Picky:
    def __init__(self, bad, way):
        self.bad, self.way = bad, way

    def __call__(self, *, fields, generator, training):
        if fields["id"] == self.bad:
            self.fail()
        return {**fields, "world": [name in os.environ for name in ("PMI_RANK", "KEPT")]}

    def fail(self):
        if self.way == "raise":
            raise ValueError("this one is bad")
        if self.way == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.way == "exit":
            os._exit(3)

class Odd:
    def __init__(self, what):
        self.what = what

    def __call__(self, *, fields, generator, training):
        image = fields["image"]
        if fields["id"] == 77:
            if self.what == "shape":
                image = image[1:]
            if self.what == "dtype":
                image = image.astype(np.float64)
            if self.what == "missing":
                return {"id": fields["id"]}
        if self.what == "nothing":
            return None
        if self.what == "needed":
            return {"image": image}
        if self.what == "text":
            image = np.array("x")
        return {**fields, "image": image}

def stuck(*, fields, generator, training):
    if fields["id"] != 0:
        time.sleep(3600)
    return fields
"""


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = tmp_path_factory.mktemp("samples") / "data"
    with Writer(folder, shard_bytes=90 * 120) as writer:
        writer.extend({"image": IMAGES, "id": np.arange(SAMPLES, dtype=">i8")})
    return open_dataset(str(folder))


@pytest.fixture(autouse=True)
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "own_samples.py").write_text(MODULE, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    before = set(psutil.Process().children())
    yield
    sys.modules.pop("own_samples", None)
    assert not [t for t in threading.enumerate() if t.name == "hpctrain-reader"]
    assert not set(psutil.Process().children()) - before


@contextlib.contextmanager
def preparation_of(
    dataset: Dataset,
    name: str,
    workers: int = 1,
    *,
    processes: bool = False,
    training: bool = True,
    **arguments: Any,
) -> Iterator[SamplePreparation]:
    environment = {"PATH": os.environ["PATH"], "KEPT": "1"} if processes else None
    pool = WorkerPool.of(
        "data.sample_transform", f"own_samples:{name}", arguments, workers, environment
    )
    try:
        yield SamplePreparation(
            "data.sample_transform",
            pool,
            dataset,
            needed=["image", "id"],
            row=0,
            training=training,
        )
    finally:
        pool.close()


def make(
    dataset: Dataset, order: Order, preparation: SamplePreparation, **changes: Any
) -> TrainLoader:
    arguments = {
        "fields": ["image", "id"],
        "global_batch_size": 32,
        "preparation": preparation,
    }
    return train_loader(dataset, order, **(arguments | changes))


def global_batches(
    dataset: Dataset,
    order: Order,
    preparation: SamplePreparation,
    world_size: int = 1,
    start: int = 0,
    **changes: Any,
) -> dict[int, str]:
    """Return a hash of each global batch of an epoch, put together of all ranks, by position."""
    parts: dict[int, list[tuple[int, bytes]]] = {}
    for rank in range(world_size):
        loader = make(dataset, order, preparation, rank=rank, world_size=world_size, **changes)
        for batch in loader.epoch(1, start):
            images, crops = batch.fields["image"].numpy(), batch.fields["crop"].numpy()
            assert images.shape == (batch.size, 3, 4, 4)
            assert crops.shape == (batch.size, 2)
            part = parts.setdefault(batch.start, [])
            for place, i in enumerate(batch.fields["id"].tolist()):
                top, left = crops[place]
                stored = IMAGES[i, :, top : top + 4, left : left + 4]
                assert abs(images[place] - stored).max() < 6  # the noise that was added
                part.append((i, images[place].tobytes() + crops[place].tobytes()))
        loader.close()
    assert sum(map(len, parts.values())) == SAMPLES - start
    return {s: xxhash.xxh3_64_hexdigest(repr(sorted(part)).encode()) for s, part in parts.items()}


@pytest.mark.parametrize("order", ORDERS, ids=["rows", "windows"])
def test_the_same_batches_at_any_world_size_number_of_workers_and_start(
    dataset: Dataset, order: Order
) -> None:
    with preparation_of(dataset, "crop") as preparation:
        expected = global_batches(dataset, order, preparation)
        for world_size in (2, 3, 4):
            assert global_batches(dataset, order, preparation, world_size) == expected
        assert global_batches(dataset, order, preparation, buffer_mb=0.02) == expected
    for workers, processes in ((3, False), (3, True)):
        with preparation_of(dataset, "crop", workers, processes=processes) as preparation:
            assert global_batches(dataset, order, preparation, 3) == expected
            for start in (64, 192):
                rest = {at: each for at, each in expected.items() if at >= start}
                assert global_batches(dataset, order, preparation, 2, start) == rest


def test_evaluations_are_told_so_and_are_the_same_every_time(dataset: Dataset) -> None:
    def evaluate(preparation: SamplePreparation, batch_size: int, world_size: int) -> torch.Tensor:
        found = []
        for rank in range(world_size):
            loader = evaluation_loader(
                dataset,
                fields=["image", "id"],
                rank=rank,
                world_size=world_size,
                batch_size=batch_size,
                preparation=preparation,
                seed=5,
            )
            batches = list(loader)
            assert all((batch.fields["crop"] == 1).all() for batch in batches)
            found += [batch.fields["image"] for batch in batches]
            loader.close()
        return torch.cat(found)

    with preparation_of(dataset, "crop", 2, training=False) as preparation:
        expected = evaluate(preparation, 50, 1)
        assert torch.equal(evaluate(preparation, 7, 1), expected)
        assert torch.equal(evaluate(preparation, 50, 3), expected)
    with preparation_of(dataset, "crop", 2, processes=True, training=False) as preparation:
        assert torch.equal(evaluate(preparation, 50, 2), expected)


def test_workers_have_the_environment_that_they_are_given(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PMI_RANK", "3")
    with preparation_of(dataset, "Picky", processes=True, bad=-1, way="") as preparation:
        loader = make(dataset, ORDERS[0], preparation)
        assert loader.example()["world"].tolist() == [[True, False]]  # in the rank
        for batch in loader.epoch(0):
            assert batch.fields["world"].tolist() == [[False, True]] * batch.size
        loader.close()


@pytest.mark.parametrize("processes", [False, True], ids=["threads", "processes"])
def test_an_exception_reaches_the_user_whole(dataset: Dataset, processes: bool) -> None:
    with preparation_of(
        dataset, "Picky", 2, processes=processes, bad=120, way="raise"
    ) as preparation:
        loader = make(dataset, ORDERS[1], preparation)
        with pytest.raises(TrainingError) as caught:
            list(loader.epoch(0))
        loader.close()
    shard, inside = dataset.shards[1], 120 - dataset.shards[0].samples
    first, *text = str(caught.value).splitlines()
    assert first == (
        f"data.sample_transform failed on sample 120 of {dataset.source}: {shard.path}, row "
        f"{inside}"
    )
    assert text[0] == "Traceback (most recent call last):"
    assert "own_samples.py" in text[1]
    assert text[1].endswith("in __call__")
    assert text[-1] == "ValueError: this one is bad"


@pytest.mark.parametrize(
    ("way", "message"),
    [
        ("kill", "was killed by SIGKILL; if nobody did that, the node may be out of memory"),
        ("exit", "ended with exit code 3"),
    ],
)
def test_a_worker_that_dies_is_told_and_does_not_hang(
    dataset: Dataset, way: str, message: str
) -> None:
    with preparation_of(dataset, "Picky", 2, processes=True, bad=120, way=way) as preparation:
        loader = make(dataset, ORDERS[1], preparation)
        for _ in range(2):  # the second time with new workers
            with pytest.raises(TrainingError, match=message) as caught:
                list(loader.epoch(0))
            assert f"samples of {dataset.source}; the first is " in str(caught.value)
        loader.close()


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("shape", r'sample 77 .*\nit made uint8 \(2, 6, 6\) of "image", and uint8 \(3, 6, 6\)'),
        ("dtype", r"sample 77 .*\nit made float64"),
        ("missing", r"sample 77 .*\nit returned id, and image, id of another"),
        ("nothing", r"sample 0 .*\nit returned NoneType"),
        ("needed", r'sample 0 .*\nit returned no "id", which the task needs: image'),
        ("text", r'sample 0 .*\nwhat it returned: field "image" has dtype <U1'),
    ],
)
def test_what_a_transform_must_not_return(dataset: Dataset, what: str, message: str) -> None:
    def run() -> None:
        with (
            preparation_of(dataset, "Odd", what=what) as preparation,
            contextlib.closing(make(dataset, ORDERS[0], preparation)) as loader,
        ):
            list(loader.epoch(0))

    with pytest.raises(TrainingError, match=message):
        run()


def test_workers_ignore_what_the_scheduler_sends_and_end_with_the_crew(dataset: Dataset) -> None:
    before = set(psutil.Process().children())
    with preparation_of(dataset, "crop", 2, processes=True) as preparation:
        loader = make(dataset, ORDERS[0], preparation, buffer_mb=0.02)
        epoch = loader.epoch(0)
        next(epoch)
        workers = set(psutil.Process().children()) - before
        assert 1 <= len(workers) <= 2
        for worker in workers:
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
                worker.send_signal(number)
        assert sum(batch.size for batch in epoch) == SAMPLES - 32
        loader.close()
        assert workers <= set(psutil.Process().children())


RANK = """
import os, time, numpy as np, psutil
from hpctrain.data.dataset import Field
from hpctrain.data.loading.worker_pool import WorkerPool, Job
from hpctrain.data.loading.worker import Slot, SlotLayout

fields = {"id": Field((), np.dtype("i8"))}
slot = Slot(SlotLayout(1, fields, fields))
slot.inputs["id"][:] = 1
pool = WorkerPool.of("key", "own_samples:stuck", {}, 1, dict(os.environ))
pool.submit(Job(slot, 0, 1, np.zeros(1, np.uint64), True))
while not (children := psutil.Process().children()):
    time.sleep(0.05)
time.sleep(1)
print(children[0].pid, flush=True)
time.sleep(3600)
"""


def test_a_worker_ends_with_its_rank_also_in_the_midst_of_a_sample() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", RANK],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    ) as rank:
        assert rank.stdout is not None
        worker = psutil.Process(int(rank.stdout.readline()))
        assert worker.is_running()
        rank.kill()
    # Where nobody reaps orphans it stays a zombie.
    wait_for(lambda: not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE)


@pytest.mark.parametrize("buffer_mb", [0.01, 1.0, 64.0, 512.0])
def test_memory_of_the_stage_is_part_of_the_plan(buffer_mb: float) -> None:
    plain = MemoryPlan.make(10_000, buffer_mb, batches=10_000)
    plan = MemoryPlan.make(10_000, buffer_mb, batches=10_000, staging=30_000)
    assert plan.depth >= 1
    assert plan.group_batches <= plain.group_batches
    assert plan.total <= max(buffer_mb * 1e6, 70_000)
