"""Run on every rank: a loop of one's own is the loop by hand over whole batches."""

from __future__ import annotations

import copy
import json
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch.utils.data import TensorDataset

import hpctrain
from hpctrain.errors import ConfigError, TrainingError
from hpctrain.training.loops import gradients
from hpctrain.training.model.undisturbed import seed_generators
from hpctrain.training.modules.stand_in import Strategy

STRATEGIES = ("ddp", "fsdp")
SAMPLES, BATCH = 130, 16
"""The last batch of an epoch has two samples: one of three ranks has none."""


def dataset() -> TensorDataset:
    generator = torch.Generator().manual_seed(5)
    inputs = torch.randn(SAMPLES, 6, generator=generator, dtype=torch.float64)
    return TensorDataset(inputs, (inputs[:, 0] > 0).long())


class Net(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.hidden = nn.Linear(6, 12)
        self.norm = nn.LayerNorm(12)
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(12, 2)

    def encode(self, x: Tensor) -> Tensor:
        return self.dropout(F.relu(self.norm(self.hidden(x))))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.encode(x))


def built(dropout: float = 0.0) -> Net:
    torch.manual_seed(3)
    return Net(dropout).double()


def whole(net: nn.Module) -> list[Tensor]:
    return [
        (item.full_tensor() if hasattr(item, "full_tensor") else item).detach().clone()
        for item in net.parameters()
    ]


def whole_batches(world: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the global batches on every rank, for the loop by hand."""
    for batch in world.loader(dataset(), BATCH, workers=0):
        x, y = batch
        rows = world.all_gather(x[: batch.size]), world.all_gather(y[: batch.size])
        assert len(rows[0]) == batch.global_size
        yield rows


def by_hand(world: Any, loss: Callable[[nn.Module, Tensor, Tensor], Tensor]) -> list[Tensor]:
    net = built()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    for x, y in whole_batches(world):
        optimizer.zero_grad()
        loss(net, x, y).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 0.5)
        optimizer.step()
    return whole(net)


def check_a_step_is_that_of_the_whole_batch(world: Any, folder: Path) -> None:
    """With shares that differ, passes, and a rank without samples."""
    expected = by_hand(world, lambda net, x, y: F.cross_entropy(net(x), y))
    for strategy in STRATEGIES:
        for passes in (None, 3):
            net = built()
            optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
            net, optimizer = world.setup(
                net, optimizer, strategy=strategy, clip_norm=0.5, precision="64-true"
            )
            loader = world.loader(dataset(), BATCH, micro_batch_size=passes, workers=0)
            named = folder / f"{strategy}-{passes}"
            with world.run(named, net, optimizer, loader, epochs=1, progress="none") as run:
                for x, y in run.steps():
                    run.step(F.cross_entropy(net(x), y))
            close(whole(net), expected)
            assert list(net.state_dict()) == list(built().state_dict())


def check_plain_loops(world: Any, folder: Path) -> None:
    """Without a run, and through a method of the model."""
    expected = by_hand(world, lambda net, x, y: F.cross_entropy(net(x), y))
    for strategy in STRATEGIES:
        net = built()
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
        net, optimizer = world.setup(
            net, optimizer, strategy=strategy, clip_norm=0.5, precision="64-true"
        )
        for batch in world.loader(dataset(), BATCH):
            x, y = batch
            optimizer.zero_grad()
            world.backward(F.cross_entropy(net(x), y), samples=batch.size)
            optimizer.step()
        close(whole(net), expected)
        assert net.encode(torch.ones(2, 6, dtype=torch.float64)).shape == (2, 12)


def check_it_is_the_loop_under_ddp_by_hand(world: Any, folder: Path) -> None:
    bare = built()
    plain = DistributedDataParallel(bare)
    theirs = torch.optim.SGD(bare.parameters(), lr=0.1, momentum=0.9)
    net = built()
    net, ours = world.setup(net, torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9))
    loader = world.loader(dataset(), 4 * world.world_size, drop_last=True, workers=0)
    for _ in range(2):
        for x, y in loader:
            theirs.zero_grad()
            F.cross_entropy(plain(x), y).backward()
            theirs.step()
            ours.zero_grad()
            F.cross_entropy(net(x), y).backward()
            ours.step()
    close(whole(net), whole(bare))


def check_weights(world: Any, folder: Path) -> None:
    """A mean over what depends on the data, such as tokens that count."""

    def of_some(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        counts = (x[:, 1] > -1).double()
        return (F.cross_entropy(net(x), y, reduction="none") * counts).sum() / counts.sum()

    expected = by_hand(world, of_some)
    net = built()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    net, optimizer = world.setup(net, optimizer, clip_norm=0.5)
    loader = world.loader(dataset(), BATCH, workers=0)
    with world.run(folder / "weights", net, optimizer, loader, epochs=1, progress="none") as run:
        for x, y in run.steps():
            counts = (x[:, 1] > -1).double()
            losses = F.cross_entropy(net(x), y, reduction="none") * counts
            run.step(losses.sum() / counts.sum().clamp(min=1), weight=counts.sum())
    close(whole(net), expected)


def records(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    found = [json.loads(line) for line in lines]
    for record in found:
        record.pop("seconds", None)
        record.pop("samples_per_second", None)
        record.pop("wall_time", None)
    return found


class Counter:
    """An object of the user's own."""

    def __init__(self) -> None:
        self.turns = 0
        self.mean = torch.zeros(2)

    def state_dict(self) -> dict[str, Any]:
        return {"turns": self.turns, "mean": self.mean}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.turns, self.mean = state["turns"], state["mean"]


class Keep:
    """A tracker that keeps the steps that it is handed."""

    def __init__(self, api_key: str) -> None:
        assert api_key == "SECRET"

    def begin_run(self, run: Any) -> None:
        self.path = run.folder / "kept"

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        if "train/other" in metrics:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(f"{step}\n")


def train(
    world: Any, folder: Path, strategy: str, steps: int, stop_at: int | None = None
) -> tuple[list[Tensor], int]:
    """Train two models for some steps, with dropout, a schedule and a state.

    At the step `stop_at` the last rank gets a signal.
    """
    seed_generators(7)
    first, second = built(0.3), built(0.3)
    slow = torch.optim.SGD(first.parameters(), lr=0.05, momentum=0.9)
    fast = torch.optim.AdamW(second.parameters(), lr=0.01)
    world.setup(first, slow, strategy=strategy, precision="64-true")
    world.setup(second, fast, strategy=strategy, precision="64-true")
    schedule = torch.optim.lr_scheduler.MultiStepLR(slow, [3, 8])
    counter = Counter()
    with world.run(
        folder,
        {"first": first, "second": second},
        [slow, fast],
        world.loader(dataset(), BATCH, workers=0),
        schedule=schedule,
        steps=steps,
        log_steps=1,
        progress="none",
        trackers=[{"use": f"{__name__}:Keep", "api_key": "SECRET"}],
        notify={"command": ["sh", "-c", 'echo "$HPCTRAIN_STATE" >> "$HPCTRAIN_FOLDER/told"']},
    ) as run:
        run.state["counter"] = counter
        for x, y in run.steps():
            run.backward(F.cross_entropy(first(x), y))
            run.update(slow)
            loss = F.cross_entropy(second(x) + first(x).detach(), y)
            run.backward(loss)
            run.update(fast)
            schedule.step()
            counter.turns += 1
            run.log(other=loss)
            if counter.turns == stop_at and world.rank == world.world_size - 1:
                os.kill(os.getpid(), signal.SIGTERM)
            if run.epoch_ended:
                with run.evaluation():
                    right = (second(x).argmax(1) == y).sum()
                    run.update_metric(accuracy=(right, len(x)))
    return [*whole(first), *whole(second)], counter.turns


def check_a_run_goes_on_bit_for_bit(world: Any, folder: Path) -> None:
    """From the middle of an epoch: models, optimizers, schedule, generators, states, metrics."""
    for strategy in STRATEGIES:
        at_once, turns = train(world, folder / f"{strategy}-whole", strategy, 21)
        assert turns == 21
        parts = folder / f"{strategy}-parts"
        with ended_by(SystemExit, code=75):
            train(world, parts, strategy, 21, stop_at=5)
        if world.is_rank_zero:
            ending = json.loads((parts / "exit.json").read_text(encoding="utf-8"))
            assert ending["reason"] == "stopped by SIGTERM"
            assert 5 <= ending["step"] < 21
        in_parts, turns = train(world, parts, strategy, 21)
        assert turns == 21
        for mine, other in zip(at_once, in_parts, strict=True):
            assert torch.equal(mine, other), strategy
        if world.is_rank_zero:
            here, there = (records(folder / f"{strategy}-{name}") for name in ("whole", "parts"))
            assert here == there
            assert (parts / "told").read_text(encoding="utf-8").split() == ["stop", "end"]
            kept = (parts / "trackers" / "keep" / "kept").read_text(encoding="utf-8").split()
            assert kept == [str(each["step"]) for each in there if each["kind"] == "train"]
            assert "SECRET" not in (parts / "config.toml").read_text(encoding="utf-8")


def check_what_is_told(world: Any, folder: Path) -> None:
    """Mistakes of a loop are errors, before they are numbers that nobody expects."""
    net = built()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with refused(ConfigError, "parameters of a model that was not given"):
        world.setup(built(), optimizer)
    with refused(ConfigError, "was not set up"):
        world.run(folder / "x", net, optimizer, steps=1).__enter__()
    world.setup(net, optimizer)
    with refused(ConfigError, "set up before"):
        world.setup(net)
    with refused(ConfigError, "world.run: "):
        world.run(folder / "x", net, optimizer, steps=1, notify={"on": ["noon"]})
    with refused(ConfigError, "world.run: "):
        world.run(folder / "x", net, optimizer, steps=1, trackers=[{"project": "x"}])
    with refused(ConfigError, "how long"):
        world.run(folder / "x", net, optimizer, world.loader(dataset(), 8)).__enter__()
    with refused(ConfigError, 'did you mean "drop_last"|did you mean drop_last'):
        world.loader(dataset(), 8, drop_lst=True)
    with (
        refused(TrainingError, "updated nothing by it"),
        world.run(
            folder / "y", net, optimizer, world.loader(dataset(), 8, workers=0), epochs=1
        ) as run,
    ):
        for x, y in run.steps():
            F.cross_entropy(net(x), y).backward()
    if world.is_rank_zero:
        ending = json.loads((folder / "y" / "exit.json").read_text(encoding="utf-8"))
        assert ending["code"] == 70
    scaled = built().float()
    theirs = torch.optim.SGD(scaled.parameters(), lr=0.1)
    with refused(ConfigError, "one loss scale"):
        world.setup(scaled, theirs, precision="16-mixed")
    spread = built()
    world.setup(spread, strategy="fsdp", precision="64-true")
    if world.world_size > 1:
        with refused(TrainingError, "was called by itself"):
            spread.hidden(torch.ones(1, 6, dtype=torch.float64))
        with refused(TrainingError, "cannot be copied"):
            copy.deepcopy(spread)


def check_formats_and_copies(world: Any, folder: Path) -> None:
    """A copy of a model in mixed precision is a model by itself."""
    net = built().float()
    world.setup(net, precision="bf16-mixed")
    twin = copy.deepcopy(net)
    x = torch.ones(2, 6)
    assert net(x).dtype == torch.float32
    assert torch.equal(net(x), twin(x))
    with torch.no_grad():
        twin.out.bias += 1
    assert not torch.equal(net(x), twin(x))
    assert type(net).__name__ == "Net"
    assert isinstance(net, Net)


def check_rows_of_all_ranks(world: Any, folder: Path) -> None:
    rows = torch.full((world.rank + 1, 2), float(world.rank), requires_grad=True)
    every = world.all_gather(rows)
    assert every[:, 0].tolist() == [r for r in range(world.world_size) for _ in range(r + 1)]
    (every.sum() * (world.rank + 1)).backward()
    assert rows.grad is not None
    total = sum(range(1, world.world_size + 1))
    assert torch.equal(rows.grad, torch.full_like(rows, float(total)))
    assert world.reduce(float(world.rank), "sum").item() == sum(range(world.world_size))
    assert world.broadcast({"from": world.rank}) == {"from": 0}
    assert world.broadcast(torch.tensor([world.rank])).item() == 0
    check_rows_of_a_module(Strategy(world), rows)
    gathered = world.gather({"rank": world.rank})
    expected = [{"rank": rank} for rank in range(world.world_size)]
    assert gathered == (expected if world.is_rank_zero else None)
    dist.barrier()


def check_rows_of_a_module(strategy: Strategy, rows: Tensor) -> None:
    """What a module's `self.all_gather` is made of, where ranks have seen other numbers of rows."""
    size = strategy.world_size
    every = [float(rank) for rank in range(size) for _ in range(rank + 1)]
    for sync_grads in (False, True):
        found = strategy.all_gather(
            rows, dist.group.WORLD, sync_grads
        )  # as Lightning's base has it
        assert found.reshape(-1, 2)[:, 0].tolist() == every
        assert found.requires_grad == (sync_grads or size == 1)
        equal = strategy.all_gather(rows[:1], sync_grads=sync_grads)
        assert equal.shape == ((size, 1, 2) if size > 1 else (1, 2))
    if size > 1:
        try:
            strategy.all_gather(torch.ones(1, 1 + strategy.global_rank))
        except TrainingError as error:
            assert "(1, 1), (1, 2)" in str(error), error
        else:
            raise AssertionError("nobody was told")


class Deep(nn.Module):
    """Layers of which each rank may use others, one of them twice, and one that nobody uses."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(6))
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.unused = nn.Linear(6, 6)
        self.out = nn.Linear(6, 2)

    def forward(self, x: Tensor, chosen: Sequence[int] = (0, 1, 2, 3, 4, 5)) -> Tensor:
        for number in chosen:
            x = torch.tanh(self.layers[number](x))
        return self.out(self.frozen(x))


def usual(world: Any, net: nn.Module, x: Tensor, y: Tensor, step: int) -> Tensor:
    return F.cross_entropy(net(x), y)


def other_layers(world: Any, net: nn.Module, x: Tensor, y: Tensor, step: int) -> Tensor:
    chosen = [number for number in range(6) if number % 3 != (world.rank + step) % 3]
    return F.cross_entropy(net(x, chosen), y)


def of_all_rows(world: Any, net: nn.Module, x: Tensor, y: Tensor, step: int) -> Tensor:
    """With a collective in the backward pass, which comes to it after other layers on each rank."""
    chosen = [number for number in range(6) if number % 3 != (world.rank + step) % 3]
    middle = world.all_gather(net.layers[0](x))
    return F.cross_entropy(net(x, chosen), y) + middle.square().mean()


def penalized(world: Any, net: nn.Module, x: Tensor, y: Tensor, step: int) -> Tensor:
    x = x.clone().requires_grad_()
    loss = F.cross_entropy(net(x), y)
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    return loss + gradient.square().sum()


def computed_anew(world: Any, net: nn.Module, x: Tensor, y: Tensor, step: int) -> Tensor:
    """A layer whose gradients come twice in one pass; later a first one that comes late."""
    layers = [net.layers[0], net.layers[1], net.layers[0], *([net.layers[2]] if step > 3 else [])]
    x = x.clone().requires_grad_()
    for layer in layers:
        x = checkpoint(layer, x, use_reentrant=True)
    return F.cross_entropy(net.out(torch.tanh(x)), y)


LOSSES = (usual, other_layers, of_all_rows, penalized)


def trained(world: Any, loader: Any, loss_of: Any, *, beside: bool) -> tuple[list[Tensor], Any]:
    """Return parameters after an epoch, and how many buckets were under way when a pass ended."""
    torch.manual_seed(4)
    net = Deep().double()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    net, optimizer = world.setup(net, optimizer, clip_norm=0.5, precision="64-true")
    stepper = world.setups.stepper_of(optimizer)
    sent = []
    apply = stepper.apply
    stepper.apply = lambda *given: (sent.append(len(stepper._reducer._works)), apply(*given))
    loader.set_epoch(0)
    for number, batch in enumerate(loader):
        x, y = batch
        loss = loss_of(world, net, x, y, number)
        if beside and batch.is_last_pass:
            world.step(loss, optimizer, samples=batch.size)
            continue
        world.backward(loss, samples=batch.size)
        if batch.is_last_pass:
            optimizer.step()
            optimizer.zero_grad()
    return whole(net), sent


def check_buckets_go_out_beside_the_backward_pass(world: Any, folder: Path) -> None:
    """Bit for bit as after it, whatever each rank's graph is; a rank may have no samples."""
    with small_buckets():
        for passes in (None, 3):
            loader = world.loader(dataset(), BATCH, micro_batch_size=passes, workers=0)
            for loss_of in LOSSES if passes is None else LOSSES[:1]:
                after, none = trained(world, loader, loss_of, beside=False)
                beside, some = trained(world, loader, loss_of, beside=True)
                for mine, other in zip(after, beside, strict=True):
                    assert torch.equal(mine, other), loss_of.__name__
                assert not any(none)
                if world.world_size == 1:
                    assert not any(some)
                elif loss_of is usual:  # the first pass is looked at; the last bucket comes later
                    assert some[0] == 0
                    assert set(some[1:-1]) == {len(after) - 1}


def check_several_optimizers_step_beside(world: Any, folder: Path) -> None:
    """Of a pass that comes to the parameters of both, those that step."""
    found = []
    with small_buckets():
        for beside in (False, True):
            seed_generators(7)
            first, second = built(), built()
            slow = torch.optim.SGD(first.parameters(), lr=0.05, momentum=0.9)
            fast = torch.optim.AdamW(second.parameters(), lr=0.01)
            world.setup(first, second, slow, fast, precision="64-true")
            loader = world.loader(dataset(), BATCH, workers=0)
            named = folder / f"several-{beside}"
            with world.run(
                named, [first, second], [slow, fast], loader, epochs=1, progress="none"
            ) as run:
                for x, y in run.steps():
                    run.backward(F.cross_entropy(first(x), y))
                    for optimizer in (slow, fast):
                        loss = F.cross_entropy(second(x) + first(x), y)
                        if beside:
                            run.step(loss, optimizer=optimizer)
                        else:
                            run.backward(loss)
                            run.update(optimizer)
            found.append([*whole(first), *whole(second)])
    for mine, other in zip(*found, strict=True):
        assert torch.equal(mine, other)


def check_what_comes_twice_in_a_pass(world: Any, folder: Path) -> None:
    """A bucket waits for as many gradients as came before; more of them are an error."""
    net = Deep().double()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    twin = copy.deepcopy(net)
    plain = torch.optim.SGD(twin.parameters(), lr=0.01)
    world.setup(net, optimizer, precision="64-true")
    world.setup(twin, plain, precision="64-true")
    generator = torch.Generator().manual_seed(world.rank)
    x, y = torch.randn(BATCH, 6, generator=generator, dtype=torch.float64), torch.arange(BATCH) % 2
    with small_buckets():
        for number in range(4):
            world.step(computed_anew(world, net, x, y, number), optimizer)
            twice = computed_anew(world, twin, x, y, number)
            world.backward(twice)
            plain.step()
            plain.zero_grad()
        for mine, other in zip(whole(net), whole(twin), strict=True):
            assert torch.equal(mine, other)
        if world.world_size > 1:
            with refused(TrainingError, "use_reentrant=False"):
                world.step(computed_anew(world, net, x, y, 4), optimizer)
            with refused(TrainingError, "cannot be left out on one rank alone"):
                world.step(computed_anew(world, net, x, y, 0), optimizer)
        dist.barrier()


def close(mine: list[Tensor], theirs: list[Tensor]) -> None:
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


@contextmanager
def small_buckets() -> Iterator[None]:
    usual = gradients.BUCKET_BYTES
    gradients.BUCKET_BYTES = 1
    try:
        yield
    finally:
        gradients.BUCKET_BYTES = usual


@contextmanager
def refused(kind: type[Exception], text: str) -> Iterator[None]:
    try:
        yield
    except kind as error:
        assert any(each in str(error) for each in text.split("|")), error
    else:
        raise AssertionError(f"not refused: {text}")


@contextmanager
def ended_by(kind: type[SystemExit], code: int) -> Iterator[None]:
    try:
        yield
    except kind as ending:
        assert ending.code == code
    else:
        raise AssertionError("the run was not stopped")


CHECKS = [
    check_a_step_is_that_of_the_whole_batch,
    check_plain_loops,
    check_it_is_the_loop_under_ddp_by_hand,
    check_weights,
    check_buckets_go_out_beside_the_backward_pass,
    check_several_optimizers_step_beside,
    check_what_comes_twice_in_a_pass,
    check_a_run_goes_on_bit_for_bit,
    check_formats_and_copies,
    check_rows_of_all_ranks,
    check_what_is_told,
]


def main() -> None:
    with hpctrain.connect() as world:
        for check in CHECKS:
            check(world, Path("own-loops"))
        world.print("passed", len(CHECKS))


if __name__ == "__main__":
    main()
