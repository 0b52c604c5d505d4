"""Small parameters in the place of a model's, to try an optimizer on."""

from __future__ import annotations

import fnmatch
import random
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from hpctrain.checkpoint.state import HasParameters
from hpctrain.config.schema import ParameterGroup

_LONGEST, _FEWEST = 64, 4
_MOST_ELEMENTS = 2**16


class StandIns:
    """Small parameters under the names of a model's: one of each kind that it has."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.parameters = dict(parameters)

    @classmethod
    def of(cls, model: HasParameters, groups: Sequence[ParameterGroup]) -> StandIns:
        """Make them: a kind is a group, a number of dimensions, a dtype and a device."""
        found: dict[tuple[object, ...], tuple[str, nn.Parameter]] = {}
        for name, item in model.named_parameters():
            if item.requires_grad:
                fits = [fnmatch.fnmatchcase(name, group.pattern) for group in groups]
                flat = 1 in item.shape or not item.numel()
                pattern = fits.index(True) if True in fits else None
                kind = (pattern, item.ndim, item.dtype, item.device, flat)
                found.setdefault(kind, (name, item))
        return cls({name: _small(item) for name, item in found.values()})

    def named_parameters(self) -> Iterable[tuple[str, nn.Parameter]]:
        """Return them by name."""
        return self.parameters.items()

    def copy(self) -> StandIns:
        """Return others with the same numbers."""
        return StandIns(
            {name: nn.Parameter(item.detach().clone()) for name, item in self.named_parameters()}
        )

    def give_gradients(self, seed: int) -> None:
        """Give each a gradient that depends on the seed alone."""
        generator = torch.Generator().manual_seed(seed)
        for item in self.parameters.values():
            item.grad = torch.empty_like(item).copy_(_drawn(item.shape, item, generator))

    def equal(self, other: StandIns) -> bool:
        """Tell whether both have the same numbers, bit for bit but for what is not a number."""
        pairs = zip(self.parameters.values(), other.parameters.values(), strict=True)
        return all(
            torch.equal(torch.nan_to_num(mine.detach()), torch.nan_to_num(theirs.detach()))
            for mine, theirs in pairs
        )


def _small(parameter: nn.Parameter) -> nn.Parameter:
    """Return a parameter of the same kind, its sizes cut."""
    longest = _LONGEST
    shape = parameter.shape
    while True:
        shape = torch.Size(min(size, longest) for size in parameter.shape)
        if shape.numel() <= _MOST_ELEMENTS or longest <= _FEWEST:
            break
        longest //= 2
    generator = torch.Generator().manual_seed(len(shape))
    drawn = _drawn(shape, parameter, generator).to(parameter.device)
    if parameter.ndim == 4 and parameter.is_contiguous(memory_format=torch.channels_last):
        drawn = drawn.contiguous(memory_format=torch.channels_last)
    return nn.Parameter(drawn)


def _drawn(shape: torch.Size, like: Tensor, generator: torch.Generator) -> Tensor:
    wide = torch.complex64 if like.is_complex() else torch.float32
    return (0.1 * torch.randn(shape, dtype=wide, generator=generator)).to(like.dtype)


def seed_all(seed: int) -> None:
    """Have optimizers that draw numbers draw the same ones."""
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - others draw from it
    random.seed(seed)


def generator_states() -> tuple[object, ...]:
    """Return what a draw of torch, numpy or Python changes."""
    modules = [getattr(torch, kind) for kind in ("cuda", "xpu")]
    # To ask others would open a context on a device that this process has not taken.
    on_device = [each.get_rng_state().tolist() for each in modules if each.is_initialized()]
    legacy = np.random.get_state()  # noqa: NPY002
    return torch.get_rng_state().tolist(), on_device, repr(legacy), random.getstate()
