"""Gradients of a loop of one's own: averaged over the ranks when an optimizer is about to step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

import torch
from torch import Tensor, nn
from torch import distributed as dist

from hpctrain.errors import TrainingError

BUCKET_BYTES = 25 * 1024 * 1024
"""Gradients that are reduced together, as DistributedDataParallel has it."""


class Reducer:
    """Averages the gradients of an optimizer's parameters, where every rank has all of them.

    DistributedDataParallel does that inside a backward pass, which it expects once after each
    forward pass of its module. A loop of one's own runs a model and its parts as often as it likes,
    several backward passes for one update, or none. And its first step sums in another order than
    all later ones, which a run that goes on can only put right by a dry run of the step. Here it is
    one reduction an update, always in the same order, whatever came before it.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], world_size: int) -> None:
        """Begin without memory: it is taken when the first gradients are there.

        Args:
            parameters: of one optimizer, in the same order on all ranks.
            world_size: number of ranks.
        """
        self._parameters = parameters
        self._world_size = world_size
        self._buckets: list[_Bucket] = []

    def reduce(self) -> list[Tensor]:
        """Return the mean gradients, and have them in the parameters. Collective: all ranks.

        A parameter that only some ranks have a gradient of counts 0 on the others; one that none
        has a gradient of keeps none, so that the optimizer leaves it as it is.

        Raises:
            TrainingError: on this rank, if a gradient is sparse.
        """
        _refuse_sparse(self._parameters)
        if self._world_size > 1:
            self._reduce()
        for item in self._parameters:
            if item.grad is not None and item.grad.is_conj():
                item.grad = item.grad.resolve_conj()  # optimizers take them for pairs of numbers
        return [item.grad for item in self._parameters if item.grad is not None]

    def _reduce(self) -> None:
        if not self._buckets:
            self._buckets = list(_buckets(self._parameters))
        used = [item.grad is not None for item in self._parameters]
        works = []
        for bucket in self._buckets:
            bucket.fill(self._world_size, used)
            works.append(dist.all_reduce(bucket.numbers, async_op=True))
        for work in works:
            work.wait()
        for bucket in self._buckets:
            bucket.give()
        # Whoever has all of them knows that each was used somewhere, and need not look.
        if not all(used):
            counts = self._buckets[0].counts.tolist()
            for item, count in zip(self._parameters, counts, strict=True):
                if not count:
                    item.grad = None


class _Bucket:
    """Gradients of some parameters of one dtype in one piece of memory.

    Attributes:
        numbers: all of it, to be reduced.
        counts: of the ranks that have a gradient of each parameter of the optimizer, divided as
            the gradients are; empty but in one bucket.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], flags: int) -> None:
        self._parameters = parameters
        sizes = [item.numel() for item in parameters]
        first = parameters[0]
        flat = torch.zeros(sum(sizes) + flags, dtype=first.dtype, device=first.device)
        *pieces, counts = flat.split([*sizes, flags])
        self._views = [_like(piece, item) for piece, item in zip(pieces, parameters, strict=True)]
        self.numbers = torch.view_as_real(flat) if flat.is_complex() else flat
        self._flags = counts
        self.counts = counts.real if flat.is_complex() else counts

    def fill(self, divisor: int, used: Sequence[bool]) -> None:
        """Take in what this rank has, each divided: a sum over ranks is a mean then."""
        if len(self._flags):
            if all(used):
                self._flags.fill_(1)
            else:
                self._flags.copy_(torch.tensor(used))
        there, here = [], []
        for item, view in zip(self._parameters, self._views, strict=True):
            if item.grad is None:
                view.zero_()
            elif item.grad is not view:
                there.append(item.grad)
                here.append(view)
        if here:
            torch._foreach_copy_(here, there)
        self.numbers.div_(divisor)

    def give(self) -> None:
        """Have the parameters' gradients be what is in the bucket."""
        for item, view in zip(self._parameters, self._views, strict=True):
            item.grad = view


def _like(piece: Tensor, parameter: Tensor) -> Tensor:
    """Return a piece of memory in a parameter's shape, and in its order where that leaves no gap.

    Fused kernels take parameters and gradients to lie alike.
    """
    if parameter.is_contiguous():
        return piece.view(parameter.shape)
    strides = torch.empty_like(parameter, device="meta").stride()
    return piece.as_strided(parameter.shape, strides)


def _buckets(parameters: Sequence[nn.Parameter]) -> Iterator[_Bucket]:
    """Yield the parameters in buckets, the last ones first, as backward passes come to them.

    The first bucket has room for a flag of every parameter, which costs no message of its own.
    """
    flags = len(parameters)
    for _, same in groupby(reversed(parameters), key=lambda item: (item.dtype, item.device)):
        waiting: list[nn.Parameter] = []
        size = 0
        for item in same:
            waiting.append(item)
            size += item.numel() * item.element_size()
            if size >= BUCKET_BYTES:
                yield _Bucket(waiting, flags)
                waiting, size, flags = [], 0, 0
        if waiting:
            yield _Bucket(waiting, flags)
            flags = 0


def _refuse_sparse(parameters: Sequence[nn.Parameter]) -> None:
    """Refuse gradients that neither clipping nor fused optimizers take."""
    for item in parameters:
        if item.grad is not None and item.grad.layout is not torch.strided:
            raise TrainingError(
                f"the gradient of a parameter {tuple(item.shape)} is sparse, which neither "
                "clipping nor fused optimizers take: build its module with sparse=False"
            )
