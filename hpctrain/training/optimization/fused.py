"""Fused kernels of torch's optimizers: where they are known to do what the plain ones do."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer

from hpctrain.errors import ConfigError

Version = tuple[int, int]

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True, kw_only=True)
class FusedKernels:
    """Kernels of which it is known that they do what the plain optimizer does.

    Attributes:
        optimizers: classes of torch.optim.
        device: type of device.
        dtypes: of the parameters.
        measured: versions of torch whose kernels were compared with the plain optimizers, see
            tests/unit/training/test_fused.py.
        read: first and last version of torch whose source was read, and not run.
    """

    optimizers: tuple[type[Optimizer], ...]
    device: str
    dtypes: tuple[torch.dtype, ...]
    measured: tuple[Version, ...] = ()
    read: tuple[Version, Version] | None = None

    def known_in(self, version: Version) -> bool:
        """Tell whether the kernels of a version of torch were measured or read."""
        return version in self.measured or (
            self.read is not None and self.read[0] <= version <= self.read[1]
        )


FUSED_KERNELS = (
    FusedKernels(
        optimizers=(Adam, AdamW, Adagrad),
        device="cpu",
        dtypes=_FLOATS,
        measured=((2, 13),),
        read=((2, 6), (2, 12)),
    ),
    # In bfloat16 and float16 whole vectors of elements stay as they are, and momentum is read past
    # its end: measured in torch 2.13. Source: pytorch/pytorch issue 191763.
    FusedKernels(
        optimizers=(SGD,),
        device="cpu",
        dtypes=(torch.float64, torch.float32),
        measured=((2, 13),),
        read=((2, 6), (2, 12)),
    ),
    # Not Adagrad: torch 2.11 refuses it on CUDA.
    FusedKernels(
        optimizers=(Adam, AdamW, SGD),
        device="cuda",
        dtypes=_FLOATS,
        read=((2, 6), (2, 13)),
    ),
)
"""All that fused kernels are taken for; what is not here is computed by the plain optimizer."""


def unknown_because(
    kind: type[Optimizer], parameters: Sequence[Tensor], version: Version | None = None
) -> str | None:
    """Return why fused kernels are not known to be right for parameters; None: they are.

    Args:
        kind: class of the optimizer.
        parameters: all that it updates, as it is given them.
        version: of torch; None: the one that runs.
    """
    version = _running_version() if version is None else version
    rows = [row for row in FUSED_KERNELS if issubclass(kind, row.optimizers)]
    if not rows:
        return f"there are none of {kind.__name__} that were compared with the plain optimizer"
    for device, dtype in {(item.device.type, item.dtype) for item in parameters}:
        fitting = [row for row in rows if row.device == device and dtype in row.dtypes]
        if not any(row.known_in(version) for row in fitting):
            return (
                f"of {kind.__name__} on {device} in {str(dtype).removeprefix('torch.')} they are "
                f"not known to compute what the plain optimizer does in torch "
                f"{version[0]}.{version[1]}"
            )
    if not all(_is_dense(item) for item in parameters):
        return (
            "they write past the elements of a parameter that is a view with gaps, such as "
            "every second column of a tensor"
        )
    return None


def refuse_unknown_kernels(optimizer: Optimizer) -> None:
    """Refuse fused kernels that the user has chosen where they are not known to be right.

    Raises:
        ConfigError: naming the reason.
    """
    chosen = [group for group in optimizer.param_groups if group.get("fused")]
    parameters = [item for group in chosen for item in group["params"]]
    reason = unknown_because(type(optimizer), parameters) if chosen else None
    if reason is not None:
        raise ConfigError(
            f"optimizer.fused = true: {reason}. Leave it out: fused kernels are used by themselves "
            "wherever they were measured or read, see docs/training.md"
        )


def _is_dense(tensor: Tensor) -> bool:
    """Tell whether a tensor's elements fill one piece of memory, in any order of dimensions."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return tensor.numel() == 0
        expected *= size
    return True


def _running_version() -> Version:
    found = re.match(r"(\d+)\.(\d+)", torch.__version__)
    assert found is not None
    return int(found[1]), int(found[2])
