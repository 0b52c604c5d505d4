"""Which combinations of strategy, precision, device and backend cannot work, and why."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True, slots=True, kw_only=True)
class Combination:
    """What a config asks for and where it is to run; None: not set, or not known yet.

    Attributes:
        strategy: as in the config.
        precision: the same.
        device: "cpu" or "cuda", where that is known.
        backend: "nccl" or "gloo", where that is known and there is more than one process.
        compress_gradients: as in the config.
        sync_batchnorm: the same; False or None with one process.
        channels_last: as in the config.
        buckets: whether bucket_mb is set.
        static_graph: as in the config.
        unused_parameters: the same.
        checks_sync: whether check_sync_every is not 0.
        shards: whether shard names units.
        cpu_offload: as in the config.
        reshard_after_forward: the same.
        graphs: whether compile_mode records CUDA graphs.
    """

    strategy: str | None = None
    precision: str | None = None
    device: str | None = None
    backend: str | None = None
    compress_gradients: str | None = None
    sync_batchnorm: bool | None = None
    channels_last: bool | None = None
    buckets: bool | None = None
    static_graph: bool | None = None
    unused_parameters: str | None = None
    checks_sync: bool | None = None
    shards: bool | None = None
    cpu_offload: bool | None = None
    reshard_after_forward: bool | None = None
    graphs: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Hole(Combination):
    """A combination that does not work; what is None may be anything."""

    because: str
    key: str
    """The key to change, of those that are set."""
    before_torch: tuple[int, int] | None = None
    """The first version in which it works; None: it works in none."""


_ASKED = tuple(each.name for each in fields(Combination))

_ONLY_FSDP = 'only training.strategy = "fsdp" spreads the parameters over the ranks'
_FSDP_REDUCES = "fsdp sums gradients in float32, and gathers parameters in the format of precision"

_HOLES = (
    _Hole(
        strategy="zero1",
        key="training.strategy",
        because=(
            "there is no strategy that spreads the optimizer's state alone. "
            '"fsdp" with training.reshard_after_forward = false spreads that and the gradients, '
            "and communicates as much as ddp"
        ),
    ),
    _Hole(
        strategy="fsdp",
        device="cpu",
        before_torch=(2, 13),
        key="training.strategy",
        # Seen: in torch 2.6 FSDP2 asks a CPU for streams; in 2.13 it does not.
        because="between CPUs it is known to work from torch 2.13 on",
    ),
    _Hole(strategy="ddp", shards=True, key="training.shard", because=_ONLY_FSDP),
    _Hole(strategy="ddp", cpu_offload=True, key="training.cpu_offload", because=_ONLY_FSDP),
    _Hole(
        strategy="ddp",
        reshard_after_forward=False,
        key="training.reshard_after_forward",
        because=_ONLY_FSDP,
    ),
    _Hole(
        strategy="fsdp",
        cpu_offload=True,
        device="cpu",
        key="training.cpu_offload",
        because="there is no device here whose memory it would save",
    ),
    _Hole(
        strategy="fsdp",
        cpu_offload=True,
        precision="16-mixed",
        key="training.precision",
        because="with cpu_offload its loss scale would cross between host and device in every step",
    ),
    _Hole(
        strategy="fsdp",
        compress_gradients="bf16",
        key="training.compress_gradients",
        because=_FSDP_REDUCES,
    ),
    _Hole(
        strategy="fsdp",
        compress_gradients="fp16",
        key="training.compress_gradients",
        because=_FSDP_REDUCES,
    ),
    _Hole(
        strategy="fsdp",
        buckets=True,
        key="training.bucket_mb",
        because="fsdp exchanges what training.shard names, unit by unit",
    ),
    _Hole(
        strategy="fsdp",
        static_graph=True,
        key="training.static_graph",
        because="it tells DDP what to expect, and fsdp has no DDP",
    ),
    _Hole(
        static_graph=True,
        unused_parameters="allow",
        key="training.static_graph",
        because='it says that every pass uses the same parameters, and unused_parameters = "allow" '
        "that some do not",
    ),
    _Hole(
        strategy="fsdp",
        unused_parameters="allow",
        before_torch=(2, 13),
        key="training.unused_parameters",
        because="fsdp reduces gradients that only some ranks have from torch 2.13 on",
    ),
    _Hole(
        strategy="fsdp",
        channels_last=True,
        key="training.channels_last",
        because="fsdp cuts parameters by rows, which have to lie one after the other in memory",
    ),
    _Hole(
        strategy="fsdp",
        checks_sync=True,
        key="training.check_sync_every",
        because="with fsdp every number is on one rank only: there is nothing to compare it with",
    ),
    _Hole(
        strategy="fsdp",
        graphs=True,
        device="cuda",
        key="training.compile_mode",
        because=(
            "a CUDA graph reads and writes where it was recorded, and fsdp gathers parameters and "
            'gradients to other memory in every pass; "default" and "max-autotune-no-cudagraphs" '
            "compile without graphs"
        ),
    ),
    _Hole(
        device="mps",
        key="launch.device",
        because='nobody has run hpctrain on an Apple GPU yet; "auto" and "cpu" train without it',
    ),
    _Hole(
        device="cpu",
        backend="nccl",
        key="launch.backend",
        because='NCCL carries nothing between CPUs; "gloo" does',
    ),
    _Hole(
        precision="bf16-true",
        backend="gloo",
        before_torch=(2, 8),
        key="training.precision",
        # Source: pytorch/pytorch issue 111131, "Invalid Scalar type"; seen to work in torch 2.13.
        because='gloo reduces bfloat16 from torch 2.8 on; "bf16-mixed" works in this version',
    ),
    _Hole(
        compress_gradients="bf16",
        backend="gloo",
        key="training.compress_gradients",
        because='torch compresses to bfloat16 over NCCL only; "fp16" works over gloo',
    ),
    _Hole(
        precision="64-true",
        compress_gradients="bf16",
        key="training.compress_gradients",
        because='precision "64-true" is there for its digits, and this leaves 3 of them',
    ),
    _Hole(
        precision="64-true",
        compress_gradients="fp16",
        key="training.compress_gradients",
        because='precision "64-true" is there for its digits, and this leaves 3 of them',
    ),
    _Hole(
        precision="16-mixed",
        compress_gradients="fp16",
        key="training.compress_gradients",
        because=(
            "the scaled loss fills the range of float16 already, and the sum over ranks would "
            'overflow; "bf16" works'
        ),
    ),
    _Hole(
        sync_batchnorm=True,
        device="cpu",
        key="training.sync_batchnorm",
        because="torch synchronises batch norms between GPUs only; group norms need no such thing",
    ),
)


def unsupported(asked: Combination, torch: str | None = None) -> tuple[str, str] | None:
    """Look a combination up.

    Args:
        asked: the combination.
        torch: its version, such as "2.8.0+cpu"; None while that is not known.

    Returns:
        The key to change and the reason; None if nothing is known against it.
    """
    for hole in _HOLES:
        holds = all(getattr(hole, name) in (None, getattr(asked, name)) for name in _ASKED)
        if holds and (hole.before_torch is None or _is_before(torch, hole.before_torch)):
            return hole.key, hole.because
    return None


def records_graphs(*, compile: bool, mode: str) -> bool:  # noqa: A002 - as the key is called
    """Tell whether a compiled model is recorded as CUDA graphs, on devices that have them.

    Source: torch/_inductor/__init__.py of torch 2.13, list_mode_options.
    """
    return compile and mode in ("reduce-overhead", "max-autotune")


def _is_before(version: str | None, first: tuple[int, int]) -> bool:
    if version is None:
        return False
    major, minor = version.split(".")[:2]
    return (int(major), int(minor)) < first
