"""The dry run of a step: passes that leave no trace find what does not fit, or couples samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hpctrain.data.loading.batch import Samples
from hpctrain.errors import HpctrainError, TrainingError
from hpctrain.topology import Communicator, raise_together
from hpctrain.training.compiler import as_written
from hpctrain.training.model.precision import NumberFormat
from hpctrain.training.model.undisturbed import (
    Disturbance,
    evaluating,
    judge,
    kept_generators,
    kept_model,
)
from hpctrain.training.modules.task import ModuleTask
from hpctrain.training.parallel.ddp import DDPModel
from hpctrain.training.task.task import Task
from hpctrain.utils.text import listed, plural

if TYPE_CHECKING:
    from hpctrain.training.parallel.fsdp import ShardedModel

Explain = Callable[[Exception, Any], HpctrainError | None]


def dry_run(
    wrapped: DDPModel | ShardedModel,
    task: Task,
    fields: Any,
    samples: int,
    *,
    arithmetic: AbstractContextManager[object],
    device: torch.device,
    communicator: Communicator,
    explain: Explain,
) -> Disturbance:
    """Run the model as a step would, without an update. Collective: all ranks.

    DDP puts the gradients into other buckets after its first backward pass, in the forward pass
    that follows, and sums in another order from then on. So that a run that starts again sums as
    one that never stopped, every start goes through that before the state is restored.

    Args:
        wrapped: of the model. Parameters, buffers, train flags, plain attributes and the random
            generators are left as they were; there are no gradients.
        task: computes the loss; its attributes are left as they were, too.
        fields: of as many samples as the largest pass has, inputs in the dtype of the parameters.
        samples: how many these are.
        arithmetic: the context of forward passes.
        device: of this rank.
        communicator: of all ranks.
        explain: returns what a model or task raised in other words, None where there are none.

    Returns:
        What the passes had done to the model.

    Raises:
        TrainingError: on every rank, if the task breaks its contract, no parameter has a part in
            the loss, or the model does to its parameters what cannot be trained rightly. What the
            model itself raises comes out as it is, with its traceback.
    """
    with kept_generators(device), kept_model(wrapped.model, task=task) as found:
        wrapped.clear_gradients()
        with raise_together(communicator), wrapped.local():
            if isinstance(task, ModuleTask):
                task.begin_dry_run(samples)
            last = _first_pass(wrapped, task, fields, samples, arithmetic, explain)
        wrapped.agree()
        wrapped.clear_gradients()
        if wrapped.distributed:
            wrapped.settle_graph()
            # The second backward pass as well: a forward pass alone would leave DDP waiting for
            # gradients to reduce, and it would take those of a pass that is only to accumulate.
            # Every parameter is reached, though the held row may leave out a branch of the model.
            loss = wrapped.reaching(task.loss)
            for _ in range(2):
                with arithmetic:
                    loss_sum, _ = wrapped.call(loss, fields)
                wrapped.backward_and_reduce(loss_sum, torch.zeros_like(loss_sum))
                wrapped.clear_gradients()
            wrapped.time_communication(last)
            wrapped.refresh()
    if isinstance(task, ModuleTask):
        task.end_dry_run()
    judge(found, communicator)
    return found


@contextmanager
def explained(explain: Explain, fields: Any) -> Iterator[None]:
    """Raise what the body raises in other words, where there are any for it."""
    try:
        yield
    except Exception as error:
        if (better := explain(error, fields)) is not None:
            raise better from error
        raise


def _first_pass(
    wrapped: DDPModel | ShardedModel,
    task: Task,
    fields: Any,
    samples: int,
    arithmetic: AbstractContextManager[object],
    explain: Explain,
) -> nn.Parameter:
    """Check the contract of the task, and which parameters get a gradient.

    Returns:
        The parameter whose gradient came last.
    """
    watched = wrapped.watched()
    layouts: dict[Tensor, torch.layout] = {}

    def arrive(parameter: Tensor) -> None:
        if parameter.grad is not None:
            layouts[parameter] = parameter.grad.layout

    hooks = [item.register_post_accumulate_grad_hook(arrive) for _, item in watched]
    try:
        with arithmetic, explained(explain, fields), wrapped.refused_lost_changes():
            result = wrapped.call(task.loss, fields)
        loss_sum = _checked(result, task, samples)
        wrapped.backward(loss_sum, torch.zeros_like(loss_sum))
    finally:
        for hook in hooks:
            hook.remove()
    _check_gradients({name: layouts[item] for name, item in watched if item in layouts})
    wrapped.unused.at_start = frozenset(name for name, item in watched if item not in layouts)
    if not layouts:
        raise TrainingError(_no_part(type(task).__name__))
    last = list(layouts)[-1]
    assert isinstance(last, nn.Parameter)
    return last


def _checked(result: object, task: Task, samples: int) -> Tensor:
    """Return the loss of what a task returned, if it is what a task should return."""
    name = type(task).__name__
    if not isinstance(result, tuple) or len(result) != 2:
        raise TrainingError(
            f"{name}.loss returned {type(result).__name__}: expected (sum of losses, weight)"
        )
    loss_sum, weight = result
    if not isinstance(loss_sum, Tensor) or loss_sum.ndim != 0 or not loss_sum.is_floating_point():
        what = (
            f"a tensor {tuple(loss_sum.shape)} of {loss_sum.dtype}"
            if isinstance(loss_sum, Tensor)
            else type(loss_sum).__name__
        )
        raise TrainingError(f"{name}.loss returned {what} as sum of losses: expected one number")
    if not loss_sum.requires_grad:
        raise TrainingError(_no_part(name))
    if task.counts_samples and (isinstance(weight, Tensor) or weight != samples):
        raise TrainingError(
            f"{name}.loss returned the weight {weight} for {samples} samples: with counts_samples "
            "= True that is the number of samples. Set it to False where weights depend on the data"
        )
    return loss_sum


def _no_part(task: str) -> str:
    return (
        f"no parameter has a part in the loss that {task} returned: something between them is "
        "detached, or computed without gradients"
    )


def _check_gradients(layouts: Mapping[str, torch.layout]) -> None:
    """Refuse gradients that are not dense."""
    sparse = [name for name, layout in layouts.items() if layout != torch.strided]
    if sparse:
        raise TrainingError(
            f"the gradients of {listed(sparse, 8)} are sparse, which neither clipping nor fused "
            "optimizers take. Build their modules with sparse=False"
        )


MOST_ROWS = 8
"""So many rows are compared at most: those of a pass, which fit into memory."""

# Relative. Rows differ in the last bits with the size of their batch: on a GPU, in TF32 by more.
_EXACT, _ROUGH, _NARROW = 1e-4, 2e-3, 2e-2

_ANSWER = (
    "so that it depends on the number of ranks and on data.micro_batch_size. For a mean over "
    "tokens, masks or weighted classes return the sum of the losses and that of the weights, with "
    "counts_samples = False; where it is meant, as with a contrastive loss, set "
    "batch_dependent_loss = true on the task"
)


def find_coupling(
    wrapped: DDPModel | ShardedModel,
    task: Task,
    rows: Samples,
    number_format: NumberFormat,
    device: torch.device,
    pass_size: int,
) -> str | None:
    """Return how the loss of a sample depends on the others in its pass, None if it does not.

    Without dropout or batch statistics, and without leaving a trace; a loss may itself be made of
    gradients, such as those by an input. What draws at random all the same is not judged. Under
    FSDP, collective: all ranks.

    Args:
        wrapped: of the model.
        task: computes the loss; it may say `batch_dependent_loss = True` itself.
        rows: real ones, at least two; as many on every rank.
        number_format: of parameters and arithmetic.
        device: of this rank.
        pass_size: samples of the largest pass, for the message.
    """
    if getattr(task, "batch_dependent_loss", False):
        return None
    comparison = _Comparison(wrapped, task, number_format, device)
    count = rows.size
    with (
        as_written(),  # three sizes of batches would be compiled
        kept_model(wrapped.model, task=task),
        evaluating(wrapped.model.modules()),
    ):
        if isinstance(task, ModuleTask):
            task.begin_dry_run(count)
        whole = comparison.loss(rows, 0, count)
        if not comparison.same(whole, comparison.loss(rows, 0, count, seed=1)):
            return None
        try:
            halves = [comparison.loss(rows, *bounds) for bounds in _halves(count)]
        except Exception as error:
            if wrapped.spread:  # whose ranks are in the middle of something
                raise
            return f"it cannot be computed for half of {count} rows ({error}): {_seen(pass_size)}"
    together = {name: halves[0][name] + halves[1][name] for name in whole}
    if comparison.same(whole, together):
        return None
    return (
        f"that of {count} rows is {whole['loss']:.6g}, and {together['loss']:.6g} as the sum of "
        f"those of its halves: {_seen(pass_size)}"
    )


def _halves(count: int) -> tuple[tuple[int, int], tuple[int, int]]:
    return (0, count // 2), (count // 2, count)


def _seen(pass_size: int) -> str:
    return f"it sees the {plural(pass_size, 'sample')} of one pass of one rank, {_ANSWER}"


class _Comparison:
    def __init__(
        self,
        wrapped: DDPModel | ShardedModel,
        task: Task,
        number_format: NumberFormat,
        device: torch.device,
    ) -> None:
        self._wrapped, self._task, self._format = wrapped, task, number_format
        self._device = device
        # Spread parameters are gathered in the narrow format.
        mixed = number_format.autocast is not None and wrapped.spread
        self._arithmetic: AbstractContextManager[object] = (
            number_format.arithmetic() if mixed else nullcontext()
        )
        narrow = mixed or any(item.element_size() < 4 for item in wrapped.model.parameters())
        self._tolerance = _NARROW if narrow else _EXACT if device.type == "cpu" else _ROUGH

    def loss(self, rows: Samples, start: int, stop: int, seed: int = 0) -> dict[str, float]:
        """Return the sums of losses and weights of some of the rows."""
        fields = self._format.cast(rows.part(start, stop), self._task.inputs)
        if isinstance(self._task, ModuleTask):
            self._task.samples = stop - start
        with self._arithmetic, kept_generators(self._device):
            torch.manual_seed(seed)
            loss_sum, weight = self._wrapped.call_alone(self._task.loss, fields)
            found = {"loss": float(loss_sum.detach()), "weight": float(weight)}
            del loss_sum, weight  # and the graph with them
        self._wrapped.settle()
        return found

    def same(self, one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
        """Tell whether both are equal but for rounding, or no numbers."""
        return all(
            not abs(one[name] - other[name])
            > self._tolerance * max(abs(one[name]), abs(other[name]))
            for name in one
        )
