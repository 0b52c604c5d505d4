"""The dry run: first passes of a start find what does not fit, and leave no trace."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hpctrain.errors import HpctrainError, TrainingError
from hpctrain.topology import Communicator, raise_together
from hpctrain.training.model.undisturbed import Disturbance, judge, kept_generators, kept_model
from hpctrain.training.modules.task import ModuleTask
from hpctrain.training.parallel.ddp import DDPModel
from hpctrain.training.task.task import Task
from hpctrain.utils.text import listed

if TYPE_CHECKING:
    from hpctrain.training.parallel.fsdp import ShardedModel

Explain = Callable[[Exception, Any], HpctrainError | None]


def prime(
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
        if (told := explain(error, fields)) is not None:
            raise told from error
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
