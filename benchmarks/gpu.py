"""What a GPU does with hpctrain, in 8 minutes: one JSON line a result.

    bash benchmarks/gpu.sh                          all of it, see there
    python benchmarks/gpu.py                        every case, each in a process of its own
    python benchmarks/gpu.py overhead save          these
    python benchmarks/gpu.py --device cpu --tiny    their logic, without a device

A case that fails or runs past its limit has a line that says so, and the next one runs. Ratios are
medians over rounds in which all loops take turns.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LIMITS = {
    "environment": 60,
    "overhead": 60,
    "save": 60,
    "accumulation": 40,
    "resnet": 75,
    "resnet-compiled": 110,
    "transformer": 60,
    "transformer-compiled": 90,
}
"""Seconds of each case, its start included."""
TOTAL_SECONDS = 470
LEAST_SECONDS = 5.0
"""Left for a case to begin."""
FLOOR = 0.98
"""Of the samples per second of a bare loop."""


@dataclass(frozen=True, slots=True)
class Wishes:
    """What was asked for.

    Attributes:
        device: "cuda" or "cpu".
        tiny: sizes at which a CPU passes all cases in some seconds.
    """

    device: str
    tiny: bool


def main() -> None:
    """Run the cases that are named, or one of them in this process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", help=f"of {', '.join(LIMITS)}")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--here", action="store_true", help="in this process, without a limit")
    given = parser.parse_args()
    unknown = [case for case in given.cases if case not in LIMITS]
    if unknown:
        parser.error(f"no case {unknown[0]}: there are {', '.join(LIMITS)}")
    wishes = Wishes(given.device, given.tiny)
    cases = given.cases or list(LIMITS)
    failed = False
    end = time.monotonic() + TOTAL_SECONDS
    for case in cases:
        if given.here:
            run_case(case, wishes)
        else:
            failed |= not run_apart(case, wishes, end - time.monotonic())
    if failed:
        sys.exit(1)


def tell(result: str, **values: object) -> None:
    """Print a line."""
    print(json.dumps({"result": result, **values}), flush=True)


def run_apart(case: str, wishes: Wishes, left: float) -> bool:
    """Run a case in a process that is ended at its limit; return whether it passed."""
    limit = min(LIMITS[case], left)
    if left < LEAST_SECONDS:
        tell(case, outcome="skipped", why="the time of all cases is over")
        return False
    command = [sys.executable, __file__, case, "--here", "--device", wishes.device]
    begin = time.monotonic()
    try:
        done = subprocess.run(
            [*command, *(["--tiny"] if wishes.tiny else [])],
            capture_output=True,
            text=True,
            timeout=limit,
            check=False,
        )
        out, why = done.stdout, done.stderr[-1500:] if done.returncode else ""
    except subprocess.TimeoutExpired as error:
        out = (error.stdout or b"").decode() if isinstance(error.stdout, bytes) else ""
        why = f"it ran past {limit:.0f} s"
    sys.stdout.write(out)
    outcome = "failed" if why else "passed"
    said = {"why": why} if why else {}
    tell(f"case {case}", outcome=outcome, seconds=round(time.monotonic() - begin, 1), **said)
    return not why


def run_case(case: str, wishes: Wishes) -> None:
    """Run one case here."""
    name, _, compiled = case.partition("-")
    if name in ("resnet", "transformer"):
        throughput(name, wishes, compiled=bool(compiled))
    else:
        {
            "environment": environment,
            "overhead": overhead,
            "save": save,
            "accumulation": accumulation,
        }[name](wishes)


def environment(wishes: Wishes) -> None:
    """Tell what runs here."""
    import torch

    found: dict[str, object] = {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "cores": os.cpu_count(),
    }
    if wishes.device == "cuda":
        about = torch.cuda.get_device_properties(0)
        found |= {
            "device": about.name,
            "bytes": about.total_memory,
            "CUDA": torch.version.cuda,
            "cuDNN": torch.backends.cudnn.version(),
            "NCCL": ".".join(map(str, torch.cuda.nccl.version())),
        }
    tell("environment", **found)


def _world(wishes: Wishes) -> Any:
    """Return a world of one on the device."""
    import torch

    from hpctrain.launch.communicators import SingleCommunicator
    from hpctrain.launch.placement import Node, place
    from hpctrain.launch.process_group import World

    device = torch.device("cuda", 0) if wishes.device == "cuda" else torch.device("cpu")
    return World(
        topology=place(0, [Node("here", "here")], launcher="none", mpi=None),
        communicator=SingleCommunicator(),
        device=device,
        backend=None,
    )


def _timed(loops: dict[str, Callable[[int], None]], steps: int, rounds: int, device: Any) -> Any:
    """Return the seconds of every loop in every round; the loops take turns."""
    from hpctrain.accelerator import synchronize

    seconds: dict[str, list[float]] = {name: [] for name in loops}
    for loop in loops.values():
        loop(3)
    for _ in range(rounds):
        for name, loop in loops.items():
            synchronize(device)
            begin = time.perf_counter()
            loop(steps)
            synchronize(device)
            seconds[name].append(time.perf_counter() - begin)
    return seconds


CONFIG = """
[run]
name = "gpu"
[model]
%s
[task]
%s
[data]
train = "none"
global_batch_size = %d
[optimizer]
use = "adamw"
lr = 1e-4
[training]
max_epochs = 1
clip_norm = 1.0
%s
"""


def _parts(model: str, task: str, batch: int, training: str, samples: Any, world: Any) -> Any:
    from synthetic import build

    return build(CONFIG % (model, task, batch, training), samples, world)[1]


def overhead(wishes: Wishes) -> None:
    """Time a step of a tiny perceptron over the same loop by hand, microseconds."""
    import torch
    import torch.nn.functional as F
    from synthetic import Samples
    from torch import nn

    world = _world(wishes)
    rows, device = 32, world.device
    fields = {
        "x": torch.randn(rows, 64, device=device),
        "y": torch.randint(10, (rows,), device=device),
    }
    samples = Samples(fields, 1)
    parts = _parts(
        'use = "mlp"\nin_features = 64\nout_features = 10\nhidden_features = [64]',
        'use = "classification"\ninputs = ["x"]\ntarget = "y"',
        rows,
        "",
        samples,
        world,
    )
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 10)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    batches = samples.epoch(0, 0)

    def by_hand(count: int) -> None:
        for _ in range(count):
            optimizer.zero_grad()
            F.cross_entropy(model(fields["x"]), fields["y"]).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()

    def ours(count: int) -> None:
        for _ in range(count):
            parts.step(next(batches), 1e-4)

    steps = 2 if wishes.tiny else 200
    seconds = _timed(
        {"by hand": by_hand, "hpctrain": ours}, steps, 5 if wishes.tiny else 15, device
    )
    each = {name: statistics.median(found) / steps * 1e6 for name, found in seconds.items()}
    tell("step overhead", unit="us per step", **{name: round(us, 1) for name, us in each.items()})


def save(wishes: Wishes) -> None:
    """Time what a save of 2 GB stalls training, over one copy of it to pinned memory."""
    import torch

    from hpctrain.accelerator import synchronize
    from hpctrain.checkpoint.manager import CheckpointManager, Retention
    from hpctrain.checkpoint.save import Snapshot

    world = _world(wishes)
    device, pin = world.device, wishes.device == "cuda"
    total = 2**21 if wishes.tiny else 2 * 10**9
    parts = 40
    tensors = {
        f"{number:02}": torch.randn(total // 4 // parts, device=device) for number in range(parts)
    }
    host = {name: torch.empty(each.shape, pin_memory=pin) for name, each in tensors.items()}
    copies = []
    for _ in range(5):
        synchronize(device)
        begin = time.perf_counter()
        for name, each in tensors.items():
            host[name].copy_(each, non_blocking=True)
        synchronize(device)
        copies.append(time.perf_counter() - begin)
    del host
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        store = CheckpointManager(
            Path(folder),
            retention=Retention(keep_last=1),
            confirm=lambda: None,
            warn=lambda _: None,
        )
        stalls = []
        for number in range(1, 4):
            before = store.stall_seconds
            store.save(Snapshot(step=number, model=tensors, training={}, values={}, config_toml=""))
            stalls.append(store.stall_seconds - before)
            store.finish()
    copy, stall = min(copies), min(stalls[1:])
    tell(
        "save",
        bytes=total,
        copy_seconds=round(copy, 4),
        stall_seconds=round(stall, 4),
        first_stall_seconds=round(stalls[0], 4),
        ratio=round(stall / copy, 3),
    )


def accumulation(wishes: Wishes) -> None:
    """Measure the memory of gradients beside DDP's buckets while passes add up."""
    import torch
    from torch import distributed as dist
    from torch import nn
    from torch.nn.parallel import DistributedDataParallel

    device = _world(wishes).device
    width = 64 if wishes.tiny else 4096
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            init_method=f"file://{folder}/meet",
            rank=0,
            world_size=1,
        )
        model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(6))).to(device)
        ddp = DistributedDataParallel(model, gradient_as_bucket_view=True)
        parameters = sum(item.numel() * 4 for item in model.parameters())
        rows = torch.randn(16, width, device=device)

        def storages() -> dict[int, int]:
            gradients = [item.grad for item in model.parameters() if item.grad is not None]
            found = [each.untyped_storage() for each in gradients]
            return {each.data_ptr(): each.nbytes() for each in found}

        peaks = {}
        buckets: dict[int, int] = {}
        beside = 0
        for passes in (1, 2):
            for _ in range(3):
                model.zero_grad()
                if device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                if passes == 2:
                    with ddp.no_sync():
                        ddp(rows).sum().backward()
                    beside = sum(n for at, n in storages().items() if at not in buckets)
                ddp(rows).sum().backward()
                buckets = storages()
            if device.type == "cuda":
                peaks[passes] = torch.cuda.max_memory_allocated() / parameters
        dist.destroy_process_group()
    tell(
        "accumulation",
        parameter_bytes=parameters,
        beside_buckets_over_parameters=round(beside / parameters, 3),
        peak_over_parameters_by_passes=peaks,
    )


def throughput(name: str, wishes: Wishes, *, compiled: bool) -> None:
    """Compare samples per second with a bare loop: from device memory, and from HDF5."""
    import torch
    from synthetic import Samples
    from torch import nn

    torch.manual_seed(0)
    world = _world(wishes)
    device = world.device
    case = (images if name == "resnet" else texts)(wishes, device)
    # Where only the logic is passed there may be no compiler.
    compiles = compiled and device.type == "cuda"
    training = case.training + ("compile = true\n" if compiles else "")
    samples = Samples(case.fields, 1)
    parts = _parts(case.model, case.task, case.batch, training, samples, world)
    bare = case.bare().to(device)
    if case.channels_last:
        bare = bare.to(memory_format=torch.channels_last)
    if compiles:
        bare.compile()
    optimizer = torch.optim.AdamW(bare.parameters(), lr=1e-4, fused=True)
    held = case.for_bare(case.fields)

    def by_hand(count: int) -> None:
        for _ in range(count):
            optimizer.zero_grad()
            with torch.autocast(device.type, dtype=torch.bfloat16):
                loss = case.loss(bare, held)
            loss.backward()
            nn.utils.clip_grad_norm_(bare.parameters(), 1.0)
            optimizer.step()

    def tuned(count: int) -> None:
        torch.backends.cudnn.benchmark = True
        by_hand(count)
        torch.backends.cudnn.benchmark = False

    def stepping(batches: Iterator[Any]) -> Callable[[int], None]:
        def steps(count: int) -> None:
            for _ in range(count):
                parts.step(next(batches), 1e-4)

        return steps

    steps = 2 if wishes.tiny else case.steps
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        loader = case.loader(Path(folder), world)
        loops = {
            "bare": by_hand,
            "device memory": stepping(samples.epoch(0, 0)),
            "HDF5": stepping(for_ever(loader)),
        }
        if name == "resnet" and not compiled:
            loops["bare, cudnn.benchmark"] = tuned
        seconds = _timed(loops, steps, 2 if wishes.tiny else 5, device)
        waited = loader.wait_seconds
        loader.close()
    rates = {k: steps * case.batch / statistics.median(v) for k, v in seconds.items()}
    ratios = {
        k: statistics.median(b / o for b, o in zip(seconds["bare"], v, strict=True))
        for k, v in seconds.items()
        if not k.startswith("bare")
    }
    if "bare, cudnn.benchmark" in rates:
        faster = rates["bare, cudnn.benchmark"] / rates["bare"]
        tell("cudnn.benchmark", times_as_fast=round(faster, 4))
    for k, ratio in ratios.items():
        tell(
            f"{name}{', compiled' if compiled else ''}, from {k}",
            precision="bf16-mixed",
            batch=case.batch,
            samples_per_second=round(rates[k], 1),
            bare_samples_per_second=round(rates["bare"], 1),
            ratio=round(ratio, 4),
            reaches_floor=ratio >= FLOOR,
            **({"loader_wait_seconds": round(waited, 3)} if k == "HDF5" else {}),
        )


def for_ever(loader: Any) -> Iterator[Any]:
    """Yield the batches of all epochs."""
    epoch = 0
    while True:
        yield from loader.epoch(epoch)
        epoch += 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A model, its data, and the same in a bare loop."""

    model: str
    task: str
    training: str
    batch: int
    steps: int
    channels_last: bool
    fields: dict[str, Any]
    bare: Callable[[], Any]
    for_bare: Callable[[dict[str, Any]], Any]
    loss: Callable[[Any, Any], Any]
    loader: Callable[[Path, Any], Any]


def images(wishes: Wishes, device: Any) -> Case:
    """Return ResNet-50 on images of 224 x 224, stored as bytes."""
    import numpy as np
    import torch
    import torch.nn.functional as F

    from hpctrain.data.loading.batch_transform import BatchTransform, Scale
    from hpctrain.models.resnet import resnet20, resnet50

    batch, size, count, classes = (4, 32, 16, 10) if wishes.tiny else (256, 224, 2048, 1000)
    net = resnet20 if wishes.tiny else resnet50
    fields = {
        "image": torch.rand(batch, 3, size, size, device=device),
        "label": torch.randint(classes, (batch,), device=device),
    }
    draw = np.random.default_rng(0)

    def loader(folder: Path, world: Any) -> Any:
        pixels = draw.integers(0, 256, (count, 3, size, size), np.uint8)
        stored = {"image": pixels, "label": draw.integers(0, classes, count)}

        def batch_transform(fields: Any) -> Any:
            scale = Scale.of(fields, "image", [127.5], [127.5], device)
            return BatchTransform(scales={"image": scale})

        return hdf5(folder, stored, batch, world, batch_transform)

    return Case(
        model=f'use = "{net.__name__}"\nnum_classes = {classes}',
        task='use = "classification"\ninputs = ["image"]\ntarget = "label"',
        training='precision = "bf16-mixed"\nchannels_last = true\n',
        batch=batch,
        steps=10,
        channels_last=True,
        fields=fields,
        bare=lambda: net(classes),
        for_bare=lambda fields: (
            fields["image"].contiguous(memory_format=torch.channels_last),
            fields["label"],
        ),
        loss=lambda model, held: F.cross_entropy(model(held[0]), held[1]),
        loader=loader,
    )


def texts(wishes: Wishes, device: Any) -> Case:
    """Return a transformer of GPT-2's smallest size on texts of 1,024 tokens."""
    import numpy as np
    import torch
    import torch.nn.functional as F

    from hpctrain.data.loading.batch_transform import BatchTransform
    from hpctrain.models.transformer import Transformer

    batch, length, count = (2, 16, 8) if wishes.tiny else (16, 1024, 512)
    vocabulary, depth, width, heads = (64, 2, 32, 2) if wishes.tiny else (50304, 12, 768, 12)
    fields = {"tokens": torch.randint(vocabulary, (batch, length + 1), device=device)}
    draw = np.random.default_rng(0)

    def loader(folder: Path, world: Any) -> Any:
        stored = {"tokens": draw.integers(0, vocabulary, (count, length + 1)).astype(np.int32)}
        return hdf5(folder, stored, batch, world, lambda fields: BatchTransform())

    def loss(model: Any, tokens: Any) -> Any:
        logits = model(tokens[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    sizes = f"vocabulary = {vocabulary}\ncontext = {length}\ndepth = {depth}\n"
    return Case(
        model=f'use = "transformer"\n{sizes}width = {width}\nheads = {heads}',
        task='use = "language_modeling"\ninputs = ["tokens"]',
        training='precision = "bf16-mixed"\n',
        batch=batch,
        steps=15,
        channels_last=False,
        fields=fields,
        bare=lambda: Transformer(vocabulary, length, depth, width, heads),
        for_bare=lambda fields: fields["tokens"].long(),
        loss=loss,
        loader=loader,
    )


def hdf5(
    folder: Path,
    stored: dict[str, Any],
    batch: int,
    world: Any,
    batch_transform: Callable[[Any], Any],
) -> Any:
    """Return a loader of samples that are stored in shards."""
    from hpctrain.data import Writer, open_dataset
    from hpctrain.data.loading.loader import LoaderOptions, TrainLoader
    from hpctrain.data.loading.preprocessing import Preprocessing
    from hpctrain.data.order.batches import Batching, Epochs, RankShare
    from hpctrain.data.order.order import Order

    count = len(next(iter(stored.values())))
    with Writer(folder / "data") as writer:
        writer.extend(stored)
    dataset = open_dataset(str(folder / "data"))
    order = Order(samples=count, seed=1, lanes=min(64, count), window=4, block_rows=1)
    batching = Batching(global_batch_size=batch, drop_last=True)
    return TrainLoader(
        dataset,
        Epochs(order, dataset.source, batching, RankShare()),
        LoaderOptions(device=world.device, buffer_mb=1024.0, threads=4),
        fields=list(stored),
        preprocessing=Preprocessing(batch_transform=batch_transform(dataset.fields)),
    )


if __name__ == "__main__":
    main()
