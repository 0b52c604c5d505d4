"""A model that answers from a record: the same outputs for a row, whatever batch it comes in.

What a model computes for a row differs in the last bits with the size of its batch, and a count of
right answers may then differ by one. A record keeps that apart from a metric that is none of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

_SIMILAR = 0.05
"""Relative to the largest output: more than rounding, in any number format."""
_MOST_MOVED = 10.0
"""By so many times the largest output, and at least by this, rows are scattered."""


class Replay:
    """Records what a model returns for some rows, and returns it again.

    Outputs of few bits are returned in float32: what a task adds up in bfloat16 differs with the
    size of a batch, if rightly.

    Attributes:
        exact: whether every answer so far could come from the record. It cannot where a task calls
            other methods of the model than the model itself, where outputs do not begin with an
            axis of samples, or where those of a sample depend on the others in its batch.
        largest: the largest number of the record; `largest_scattered`: of what is scattered.
    """

    def __init__(self, model: nn.Module, count: int) -> None:
        """Take a model, and how many rows its record will be of."""
        self._model = model
        self._count = count
        self._outputs: list[Any] = []
        self._mismatch = False
        self._draws = False

    @property
    def exact(self) -> bool:
        return bool(self._outputs) and not self._mismatch

    @property
    def largest(self) -> float:
        leaves = [leaf for output in self._outputs for leaf in tree_flatten(output)[0]]
        return max((_largest(leaf) for leaf in leaves if _is_floating(leaf)), default=0.0)

    @property
    def largest_scattered(self) -> float:
        return self.largest + _MOST_MOVED * max(1.0, self.largest)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record what the model returns in the body."""

        def record(call: int, run: Callable[[], Any]) -> Any:
            computed = run()
            # Copies: a model may return what it writes to again.
            self._outputs.append(tree_map(_copied, computed))
            return computed

        with self._answering(record):
            yield

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Have the model compute the same rows again in the body, and see whether it draws."""

        def compare(call: int, run: Callable[[], Any]) -> Any:
            computed = run()
            self._draws = self._draws or not _similar(computed, self._recorded(call))
            return computed

        with self._answering(compare):
            yield

    @contextmanager
    def of_all(self) -> Iterator[None]:
        """Have the model compute in the body, and return its record."""

        def answer(call: int, run: Callable[[], Any]) -> Any:
            run()  # under FSDP all parts of it have to be called in every pass
            return self._recorded(call)

        with self._answering(answer):
            yield

    @contextmanager
    def of_rows(self, start: int, stop: int) -> Iterator[None]:
        """Have the model return its record of some rows, if that is what it computes for them."""

        def answer(call: int, run: Callable[[], Any]) -> Any:
            computed, recorded = run(), self._rows(self._recorded(call), start, stop)
            if recorded is not None and _similar(computed, recorded, in_values=not self._draws):
                return recorded
            self._mismatch = True
            return computed

        with self._answering(answer):
            yield

    @contextmanager
    def scattered(self, start: int, stop: int, seed: int) -> Iterator[None]:
        """Have the model return outputs, for some of the rows, that differ much from row to row.

        They are the same for a row whatever the others are, and other ones with another seed.
        """

        def answer(call: int, run: Callable[[], Any]) -> Any:
            generator = torch.Generator().manual_seed(1000 * seed + call)
            outputs = tree_map(lambda leaf: _scattered(leaf, generator), self._recorded(call))
            return self._rows(outputs, start, stop)

        with self._answering(answer):
            yield

    @contextmanager
    def _answering(self, answer: Callable[[int, Callable[[], Any]], Any]) -> Iterator[None]:
        """Answer calls of the model in the body: in place of its hooks, and of what is compiled.

        `answer` gets how many calls came before, and what runs the model.
        """
        model: Any = self._model
        calls = 0

        def called(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            return answer(calls - 1, lambda: model._call_impl(*args, **kwargs))

        with _uncompiled(model):
            model._compiled_call_impl = called
            try:
                yield
            finally:
                model._compiled_call_impl = None

    def _recorded(self, call: int) -> Any:
        # A task that calls the model more often the second time is found by its metrics.
        return self._outputs[min(call, len(self._outputs) - 1)]

    def _rows(self, outputs: Any, start: int, stop: int) -> Any:
        """Return some rows of all tensors in outputs; None where one is not of rows."""
        leaves, form = tree_flatten(outputs)
        if any(isinstance(leaf, Tensor) and leaf.shape[:1] != (self._count,) for leaf in leaves):
            return None
        rows = [leaf[start:stop] if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        return tree_unflatten(rows, form)


@contextmanager
def _uncompiled(model: nn.Module) -> Iterator[None]:
    """Have no module run what was compiled of it: for a few rows that is not worth its time."""
    compiled = [
        (module, module._compiled_call_impl)
        for module in model.modules()
        if module._compiled_call_impl is not None
    ]
    for module, _ in compiled:
        module._compiled_call_impl = None
    try:
        yield
    finally:
        for module, call in compiled:
            module._compiled_call_impl = call


def _similar(computed: Any, recorded: Any, *, in_values: bool = True) -> bool:
    """Tell whether outputs are alike: in form and shapes, and nearly in what they are."""
    (ours, form), (theirs, other_form) = tree_flatten(computed), tree_flatten(recorded)
    if form != other_form:
        return False
    for one, other in zip(ours, theirs, strict=True):
        if not isinstance(one, Tensor):
            continue
        if not isinstance(other, Tensor) or one.shape != other.shape:
            return False
        if not in_values or not _is_floating(one):
            continue
        if _largest(_wide(one) - other) > _SIMILAR * _largest(other):
            return False
    return True


def _is_floating(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.numel() > 0


def _largest(numbers: Tensor) -> float:
    return numbers.abs().nan_to_num(0.0, 0.0, 0.0).max().item()


def _copied(leaf: Any) -> Any:
    return _wide(leaf).clone() if isinstance(leaf, Tensor) else leaf


def _wide(leaf: Any) -> Any:
    narrow = isinstance(leaf, Tensor) and leaf.dtype in (torch.bfloat16, torch.float16)
    return leaf.float() if narrow else leaf


def _scattered(leaf: Any, generator: torch.Generator) -> Any:
    """Return numbers moved up: some rows by a little, others by much, no two of them alike."""
    if not _is_floating(leaf) or not leaf.ndim:
        return leaf
    draws = torch.rand(leaf.shape, generator=generator)
    rows = (
        _MOST_MOVED
        * torch.logspace(-2, 0, len(leaf))[torch.randperm(len(leaf), generator=generator)]
    )
    moves = draws * rows.view(-1, *[1] * (leaf.ndim - 1))
    return leaf + (max(1.0, _largest(leaf)) * moves).to(leaf.device, leaf.dtype)
