"""Which combinations of strategy, precision, device and backend cannot work, and why."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class _Hole:
    """A combination that does not work; what is None may be anything."""

    because: str
    key: str
    """The key to change, of those that are set."""
    precision: str | None = None
    device: str | None = None
    backend: str | None = None
    compress_gradients: str | None = None
    sync_batchnorm: bool | None = None
    before_torch: tuple[int, int] | None = None
    """The first version in which it works; None: it works in none."""


_HOLES = (
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


def unsupported(
    *,
    precision: str | None = None,
    device: str | None = None,
    backend: str | None = None,
    compress_gradients: str | None = None,
    sync_batchnorm: bool | None = None,
    torch: str | None = None,
) -> tuple[str, str] | None:
    """Look a combination up.

    Args:
        precision: as in the config.
        device: "cpu" or "cuda"; None or "auto" while that is not known.
        backend: "nccl" or "gloo"; None or "auto" while that is not known, or with one process.
        compress_gradients: as in the config.
        sync_batchnorm: the same; False or None with one process.
        torch: its version, such as "2.8.0+cpu"; None while that is not known.

    Returns:
        The key to change and the reason; None if nothing is known to speak against it.
    """
    given = {
        "precision": precision,
        "device": device,
        "backend": backend,
        "compress_gradients": compress_gradients,
        "sync_batchnorm": sync_batchnorm,
    }
    for hole in _HOLES:
        holds = all(getattr(hole, name) in (None, value) for name, value in given.items())
        if holds and (hole.before_torch is None or _is_before(torch, hole.before_torch)):
            return hole.key, hole.because
    return None


def _is_before(version: str | None, first: tuple[int, int]) -> bool:
    if version is None:
        return False
    major, minor = version.split(".")[:2]
    return (int(major), int(minor)) < first
