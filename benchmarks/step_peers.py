"""The loops that benchmarks/step.py compares hpctrain's with: by hand, and those of the peers."""

from __future__ import annotations

import json
import logging
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR

from hpctrain.launch.process_group import World
from hpctrain.models.mlp import MLP

STEPS, LOG_EVERY, TOTAL_STEPS = 50, 10, 10**6
LIGHTNING = "Lightning, CSV logger"
Loop = Callable[[], None]
"""Runs a block of steps."""


class ByHand:
    """What anybody writes first."""

    def __init__(self, world: World, fields: dict[str, Tensor], *, clip: bool = True) -> None:
        self.fields, self.clip, self.alone = fields, clip, world.topology.world_size == 1
        self.model: nn.Module = MLP(64, 10, [64])
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, fused=True)
        if not self.alone:
            self.model = DistributedDataParallel(self.model, gradient_as_bucket_view=True)

    def __call__(self) -> None:
        for _ in range(STEPS):
            loss = nn.functional.cross_entropy(self.model(self.fields["x"]), self.fields["y"])
            loss.backward()
            if self.clip:
                nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=self.alone)


def peers(world: World, fields: dict[str, Tensor], folder: Path) -> dict[str, Loop]:
    """Return the loops of others that are installed, in a world that is made already."""
    logging.disable(logging.WARNING)
    topology = world.topology
    os.environ |= {
        "RANK": str(topology.rank),
        "WORLD_SIZE": str(topology.world_size),
        "LOCAL_RANK": str(topology.local_rank),
        "LOCAL_WORLD_SIZE": str(topology.local_world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
    }
    found: dict[str, Loop] = {}
    if find_spec("ignite"):
        found["Ignite"] = ignite(world, fields, folder)
    if find_spec("accelerate"):
        found["Accelerate"] = accelerate(fields, folder)
    if find_spec("lightning"):
        found["Fabric"] = fabric(world, fields, folder)
        found[LIGHTNING] = Lightning(world, fields, folder, full=False)
        found["Lightning, as it comes"] = Lightning(world, fields, folder, full=True)
    return found


def rise(step: int) -> float:
    return min(1.0, (step + 1) / 50)


def by_hand_log(folder: Path, name: str) -> Callable[[int, Tensor], None]:
    file = (folder / f"{name}-{os.getpid()}.jsonl").open("w", buffering=1)

    def log(step: int, loss: Tensor) -> None:
        file.write(json.dumps({"step": step, "loss": loss.item()}) + "\n")

    return log


def ignite(world: World, fields: dict[str, Tensor], folder: Path) -> Loop:
    from ignite.engine import Engine, Events
    from ignite.handlers import LRScheduler

    bare = ByHand(world, fields)
    log = by_hand_log(folder, "ignite")

    def update(_: Engine, batch: dict[str, Tensor]) -> Tensor:
        bare.optimizer.zero_grad()
        loss = nn.functional.cross_entropy(bare.model(batch["x"]), batch["y"])
        loss.backward()
        nn.utils.clip_grad_norm_(bare.model.parameters(), 1.0)
        bare.optimizer.step()
        return loss.detach()

    engine = Engine(update)
    engine.add_event_handler(Events.ITERATION_STARTED, LRScheduler(LambdaLR(bare.optimizer, rise)))
    engine.add_event_handler(
        Events.ITERATION_COMPLETED(every=LOG_EVERY),
        lambda: log(engine.state.iteration, engine.state.output),
    )
    return lambda: engine.run([fields] * STEPS, max_epochs=1) and None


def fabric(world: World, fields: dict[str, Tensor], folder: Path) -> Loop:
    from lightning.fabric import Fabric
    from lightning.fabric.loggers import CSVLogger
    from lightning.fabric.plugins.environments import LightningEnvironment

    size = world.topology.world_size
    logger = CSVLogger(folder / "fabric", flush_logs_every_n_steps=LOG_EVERY)
    made = Fabric(
        accelerator="cpu", devices=size, strategy="ddp" if size > 1 else "auto",
        loggers=logger, plugins=[_outside(LightningEnvironment)()],
    )  # fmt: skip
    made.launch()
    model: Any = MLP(64, 10, [64])
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    model, optimizer = made.setup(model, optimizer)
    schedule = LambdaLR(optimizer, rise)
    step = 0

    def block() -> None:
        nonlocal step
        for _ in range(STEPS):
            step += 1
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(fields["x"]), fields["y"])
            made.backward(loss)
            made.clip_gradients(model, optimizer, max_norm=1.0, error_if_nonfinite=False)
            optimizer.step()
            schedule.step()
            if step % LOG_EVERY == 0:
                made.log_dict({"loss": loss.item()}, step=step)

    return block


def accelerate(fields: dict[str, Tensor], folder: Path) -> Loop:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model: Any = MLP(64, 10, [64])
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    model, optimizer, schedule = accelerator.prepare(model, optimizer, LambdaLR(optimizer, rise))
    log, step = by_hand_log(folder, "accelerate"), 0

    def block() -> None:
        nonlocal step
        for _ in range(STEPS):
            step += 1
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(fields["x"]), fields["y"])
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            if step % LOG_EVERY == 0:
                log(step, loss)

    return block


def _outside(environment: Any) -> Any:
    """Return a Lightning environment whose processes exist already."""

    class Outside(environment):
        @property
        def creates_processes_externally(self) -> bool:
            return True

        def global_rank(self) -> int:
            return int(os.environ["RANK"])

        def world_size(self) -> int:
            return int(os.environ["WORLD_SIZE"])

        def local_rank(self) -> int:
            return int(os.environ["LOCAL_RANK"])

        def set_world_size(self, size: int) -> None:
            """It is what it is."""

        def set_global_rank(self, rank: int) -> None:
            """It is what it is."""

    return Outside


class Lightning:
    """A Trainer in a greenlet's manner: its data make it wait between blocks.

    A Trainer runs to its end; so it runs in a thread, and the source of its batches hands over to
    the other loops whenever a block is done. Only one of the two threads runs at a time.
    """

    def __init__(
        self, world: World, fields: dict[str, Tensor], folder: Path, *, full: bool
    ) -> None:
        self.go, self.done = threading.Semaphore(0), threading.Semaphore(0)
        self.thread = threading.Thread(
            target=self._train, args=(world, fields, folder, full), daemon=True
        )
        self.thread.start()
        self.done.acquire()  # set up, and asking for its first batch

    def __call__(self) -> None:
        self.go.release()
        self.done.acquire()
        if not self.thread.is_alive():
            raise RuntimeError("the Trainer has ended")

    def _batches(self, fields: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
        while True:
            self.done.release()
            self.go.acquire()
            for _ in range(STEPS):
                yield fields

    def _train(self, world: World, fields: dict[str, Tensor], folder: Path, full: bool) -> None:
        import lightning
        from lightning.pytorch.loggers import CSVLogger
        from lightning.pytorch.plugins.environments import LightningEnvironment

        class Module(lightning.LightningModule):
            def __init__(self) -> None:
                super().__init__()
                self.model = MLP(64, 10, [64])

            def training_step(self, batch: dict[str, Tensor]) -> Tensor:
                loss = nn.functional.cross_entropy(self.model(batch["x"]), batch["y"])
                self.log("loss", loss, prog_bar=full)
                return loss

            def configure_optimizers(self) -> Any:
                optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3, fused=True)
                schedule = {"scheduler": LambdaLR(optimizer, rise), "interval": "step"}
                return {"optimizer": optimizer, "lr_scheduler": schedule}

        batches = self._batches(fields)

        class Endless(torch.utils.data.IterableDataset[dict[str, Tensor]]):
            def __iter__(self) -> Iterator[dict[str, Tensor]]:
                return batches

        size = world.topology.world_size
        place = folder / f"lightning-{full}"
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                trainer = lightning.Trainer(
                    max_steps=TOTAL_STEPS, accelerator="cpu", devices=size,
                    strategy="ddp" if size > 1 else "auto", gradient_clip_val=1.0,
                    logger=CSVLogger(place, flush_logs_every_n_steps=LOG_EVERY),
                    log_every_n_steps=LOG_EVERY, enable_checkpointing=full,
                    enable_progress_bar=full, enable_model_summary=full,
                    default_root_dir=place, plugins=[_outside(LightningEnvironment)()],
                )  # fmt: skip
                loader = torch.utils.data.DataLoader(Endless(), batch_size=None)
                trainer.fit(Module(), loader)
        finally:
            self.done.release()
