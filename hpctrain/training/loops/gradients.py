"""Gradients of an own loop: all_reduce in buckets, beside the backward pass or before a step."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from itertools import groupby

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.autograd.graph import get_gradient_edge

from hpctrain.errors import TrainingError

BUCKET_BYTES = 25 * 1024 * 1024
"""Gradients that are reduced together, as DistributedDataParallel has it."""


class Reducer:
    """Averages the gradients of an optimizer's parameters, where every rank has all of them.

    DistributedDataParallel expects one backward pass after each forward pass of its module. A loop
    of one's own runs a model and its parts as often as it likes, several backward passes for one
    update, or none. And DDP's first step sums in another order than all later ones, which a run
    that goes on can only put right by a dry run of the step. Here it is one reduction an update,
    in buckets that are the same from the first step on.

    Where a backward pass is known to be the last before the update (`expect`), a bucket goes out
    beside it, once all of its gradients are there. When it does is each rank's own affair: ranks
    share the order of the buckets only. So their graphs may differ, and one may have none. The
    last bucket waits for `reduce`, since that shows which parameters have been used.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        world_size: int,
        make_group: Callable[[], dist.ProcessGroup],
    ) -> None:
        """Begin without memory: it is taken when the first gradients are there.

        Args:
            parameters: of one optimizer, in the same order on all ranks.
            world_size: number of ranks.
            make_group: returns the process group of reductions beside a backward pass. What that
                pass itself communicates must not come between them, or they between that: where
                graphs differ, ranks would do both in different orders. Collective: all ranks.
        """
        self._parameters = parameters
        self._world_size = world_size
        self._make_group = make_group
        self._group: dist.ProcessGroup | None = None
        self._buckets: list[_Bucket] = []
        self._works: list[dist.Work] = []
        self._arrivals: _Arrivals | None = None

    def expect(self, loss: Tensor | None) -> None:
        """Reduce beside the backward pass that follows, the last before `reduce`. Collective.

        Args:
            loss: what it begins with; None: this rank has no samples, and waits for `reduce`.

        Raises:
            TrainingError: on this rank, if the pass before was not followed by `reduce`.
        """
        if self._world_size == 1 or len(self._plan) == 1:
            return
        if self._works:
            raise TrainingError(
                "the backward pass of the step before has failed, after some of its gradients had "
                "gone to the other ranks: a step cannot be left out on one rank alone"
            )
        if self._arrivals is None:
            self._group = self._make_group()
            self._arrivals = _Arrivals(self._plan, self._take, self._send)
        if loss is not None:
            self._arrivals.begin(loss)

    def reduce(self) -> list[Tensor]:
        """Return the mean gradients, and have them in the parameters. Collective: all ranks.

        A parameter that only some ranks have a gradient of counts 0 on the others; one that none
        has a gradient of keeps none, so that the optimizer leaves it as it is.

        Raises:
            TrainingError: on this rank, if a gradient is sparse.
        """
        if self._arrivals is not None:
            self._arrivals.end()
        _refuse_sparse(self._parameters)
        if self._world_size > 1:
            with torch.no_grad():
                self._reduce()
        for item in self._parameters:
            if item.grad is not None and item.grad.is_conj():
                item.grad = item.grad.resolve_conj()  # optimizers take them for pairs of numbers
        return [item.grad for item in self._parameters if item.grad is not None]

    def _reduce(self) -> None:
        used = [item.grad is not None for item in self._parameters]
        self._make_buckets()
        self._buckets[-1].say(used)
        while len(self._works) < len(self._buckets):
            self._send()
        for work in self._works:
            work.wait()
        self._works.clear()
        for bucket in self._buckets:
            bucket.give()
        # Whoever has all of them knows that each was used somewhere, and need not look.
        if not all(used):
            counts = self._buckets[-1].counts.tolist()
            for item, count in zip(self._parameters, counts, strict=True):
                if not count:
                    item.grad = None

    @cached_property
    def _plan(self) -> list[list[nn.Parameter]]:
        return _plan(self._parameters)

    def _make_buckets(self) -> None:
        if not self._buckets:
            *plan, last = self._plan
            self._buckets = [_Bucket(items, 0) for items in plan]
            self._buckets.append(_Bucket(last, len(self._parameters)))

    def _take(self, bucket: int, number: int) -> None:
        """Take a gradient in that is there, so that memory of its own is needed no longer."""
        with torch.no_grad():
            self._buckets[bucket].take(number, self._world_size)

    def _send(self) -> None:
        """Have the next bucket go out, with the gradients that are there."""
        with torch.no_grad():
            bucket = self._buckets[len(self._works)]
            bucket.fill(self._world_size)
            work = dist.all_reduce(bucket.numbers, group=self._group, async_op=True)
        assert work is not None
        self._works.append(work)


class _Arrivals:
    """Gradients as they come in a backward pass: a bucket is sent once it has all of its.

    A parameter may get several in one pass, where parts of the graph are computed anew (reentrant
    checkpoints). So the first pass only counts them, and later ones wait for as many. A parameter
    that has never had one is asked for in the graph of the pass; one that got some in an earlier
    pass and gets none now holds up its bucket, and those behind it, until the pass has ended.
    """

    def __init__(
        self,
        buckets: Sequence[Sequence[nn.Parameter]],
        take: Callable[[int, int], None],
        send: Callable[[], None],
    ) -> None:
        """Listen to parameters.

        Args:
            buckets: of parameters, in the order in which they are sent; the last is not sent here.
            take: takes in the gradient of a parameter: its bucket, and its number there.
            send: sends the next bucket.
        """
        self._parameters = [item for bucket in buckets for item in bucket]
        self._places = [(at, n) for at, bucket in enumerate(buckets) for n in range(len(bucket))]
        self._last = len(buckets) - 1
        self._take, self._send = take, send
        self._most = [0] * len(self._parameters)
        self._counts = [0] * len(self._parameters)
        self._missing = [0] * len(buckets)
        self._taken: set[int] = set()
        self._sent = 0
        self._learned = self._open = self._holds = False
        self._device = self._parameters[0].device
        self._on_one = all(item.device == self._device for item in self._parameters)
        self._stream: object = None
        # A hook of a parameter that held this would keep both for ever.
        arrived = weakref.ref(self)
        for number, item in enumerate(self._parameters):
            if item.requires_grad:
                item.register_post_accumulate_grad_hook(partial(_pass_on, arrived, number))

    def begin(self, loss: Tensor) -> None:
        """Look at the backward pass that begins with `loss`."""
        self._open, self._sent = True, 0
        self._taken.clear()
        self._counts = [0] * len(self._counts)
        self._missing = [0] * len(self._missing)
        unknown, hooks = [], 0
        for number, item in enumerate(self._parameters):
            if item.requires_grad:
                hooks = max(hooks, len(item._post_accumulate_grad_hooks or ()))
                if self._most[number]:
                    self._missing[self._places[number][0]] += 1
                else:
                    unknown.append(number)
        # Hooks of others may come after ours, and change a gradient that would be gone by then.
        self._holds = not (self._learned and self._on_one) or hooks > 1
        self._stream = self._current_stream()
        if unknown and not self._holds:
            loss.register_hook(partial(self._look_for, unknown))

    def end(self) -> None:
        """Take note of what came, if there was a pass."""
        if self._open:
            self._most = [max(pair) for pair in zip(self._most, self._counts, strict=True)]
            self._open, self._learned = False, True

    def arrived(self, number: int) -> None:
        """Take note of a gradient that was added to a parameter's.

        Raises:
            TrainingError: if the parameter's gradient is on its way already.
        """
        if not self._open:
            return
        self._counts[number] += 1
        bucket, at = self._places[number]
        if self._current_stream() != self._stream:
            self._holds = True  # for the end of the pass, which waits for all of its streams
        if bucket < self._sent or number in self._taken:
            raise TrainingError(
                f"a parameter {tuple(self._parameters[number].shape)} got a further gradient in "
                "one backward pass, after the first had gone to the other ranks: take "
                "torch.utils.checkpoint with use_reentrant=False, or run.backward(loss) and "
                "run.update(optimizer) in place of run.step(loss)"
            )
        if self._counts[number] == self._most[number] and not self._holds:
            self._take(bucket, at)
            self._taken.add(number)
            self._missing[bucket] -= 1
        while not (self._holds or self._missing[self._sent] or self._sent == self._last):
            self._sent += 1
            self._send()

    def _look_for(self, numbers: Sequence[int], _: Tensor) -> None:
        """Find those of some parameters to which the running backward pass comes."""
        for number in numbers:
            node = get_gradient_edge(self._parameters[number]).node
            if torch._C._will_engine_execute_node(node):
                self._most[number] = 1
                self._missing[self._places[number][0]] += 1

    def _current_stream(self) -> object:
        if self._device.type == "cpu":
            return None
        return torch.get_device_module(self._device).current_stream(self._device)


def _pass_on(arrivals: weakref.ref[_Arrivals], number: int, _: Tensor) -> None:
    """Stand for a hook of a parameter."""
    found = arrivals()
    if found is not None:
        found.arrived(number)


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
        self._taken = [False] * len(parameters)
        self._flags = counts
        self.counts = counts.real if flat.is_complex() else counts

    def say(self, used: Sequence[bool]) -> None:
        """Take in which parameters of the optimizer this rank has gradients of."""
        if all(used):
            self._flags.fill_(1)
        else:
            self._flags.copy_(torch.tensor(used))

    def take(self, number: int, divisor: int) -> None:
        """Take in the gradient of one parameter, divided: a sum over ranks is a mean then."""
        item, view = self._parameters[number], self._views[number]
        _refuse_sparse([item])
        if item.grad is None:
            view.zero_()
        else:
            torch.div(item.grad, divisor, out=view)
            item.grad = view
        self._taken[number] = True

    def fill(self, divisor: int) -> None:
        """Take in what this rank has, and was not taken in yet."""
        for number, taken in enumerate(self._taken):
            if not taken:
                self.take(number, divisor)
        self._flags.div_(divisor)

    def give(self) -> None:
        """Have the parameters' gradients be what is in the bucket."""
        for item, view in zip(self._parameters, self._views, strict=True):
            item.grad = view
        self._taken = [False] * len(self._taken)


def _like(piece: Tensor, parameter: Tensor) -> Tensor:
    """Return a piece of memory in a parameter's shape, and in its order where that leaves no gap.

    Fused kernels take parameters and gradients to lie alike.
    """
    if parameter.is_contiguous():
        return piece.view(parameter.shape)
    strides = torch.empty_like(parameter, device="meta").stride()
    return piece.as_strided(parameter.shape, strides)


def _plan(parameters: Sequence[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Return the parameters in buckets, the last ones first, as backward passes come to them."""
    plan: list[list[nn.Parameter]] = []
    for _, same in groupby(reversed(parameters), key=lambda item: (item.dtype, item.device)):
        size = BUCKET_BYTES
        for item in same:
            if size >= BUCKET_BYTES:
                plan.append([])
                size = 0
            plan[-1].append(item)
            size += item.numel() * item.element_size()
    return plan


def _refuse_sparse(parameters: Sequence[nn.Parameter]) -> None:
    """Refuse gradients that neither clipping nor fused optimizers take."""
    for item in parameters:
        if item.grad is not None and item.grad.layout is not torch.strided:
            raise TrainingError(
                f"the gradient of a parameter {tuple(item.shape)} is sparse, which neither "
                "clipping nor fused optimizers take: build its module with sparse=False"
            )
