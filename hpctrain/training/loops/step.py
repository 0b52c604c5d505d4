"""State of an own loop in a checkpoint: models, optimizers, LR schedules, registered objects."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.optim import Optimizer

from hpctrain.checkpoint.optimizer_state import OWN, SavedOptimizer
from hpctrain.checkpoint.state import Json
from hpctrain.errors import ConfigError, TrainingError
from hpctrain.launch.process_group import World
from hpctrain.training.checkpointing.snapshot import parameter_of
from hpctrain.training.loops.registry import Setups
from hpctrain.training.loops.stepper import Named, Stepper
from hpctrain.training.model.registered_state import REGISTERED, RegisteredState, Stateful
from hpctrain.training.model.undisturbed import Disturbance
from hpctrain.training.modules.scheduler_state import load_portable, portable_state
from hpctrain.training.nonfinite import RECENT_STEPS, BadBatch, bad_among
from hpctrain.training.step import named_numbers
from hpctrain.utils.text import plural

Counted = tuple[Tensor, float | Tensor]
"""A number of a pass, and how much it counts."""


class LoopStep:
    """The models and optimizers of a run, in the place of a job's `TrainStep`.

    Attributes:
        model: the model; of several, a module that has them all.
        held: what this rank holds of the parameters, and updates.
        sharded: the same where they are spread over the ranks, else None.
        steppers: what steps for each optimizer.
        losses: of the running step.
        grad_accum_steps: passes per rank and step.
        registered: whatever else is saved with the run, by name.
    """

    average = None
    grad_accum_steps = 1

    def __init__(self, world: World, setups: Setups, models: Mapping[str, nn.Module]) -> None:
        """Take the models in.

        Args:
            world: the ranks.
            setups: of the world.
            models: all that were set up, by name; one alone has the name "".

        Raises:
            ConfigError: if one was not set up, or they are held in different ways.
        """
        known = {id(held.model): held for held in setups.held()}
        for model in models.values():
            if id(model) not in known:
                raise ConfigError(
                    f"{type(model).__name__} was not set up: net, optimizer = world.setup(net, "
                    "optimizer) before world.run"
                )
        held = [known[id(model)] for model in models.values()]
        names = list(models)
        own = {id(item) for each in held for _, item in each.named_parameters()}
        self.steppers = [
            stepper
            for stepper in setups.steppers()
            if any(id(item) in own for item in stepper.parameters)
        ]
        if not self.steppers:
            raise ConfigError("none of the models has an optimizer: world.setup(net, optimizer)")
        self.model = next(iter(models.values())) if names == [""] else _Together(models)
        self.held = Named(held, names)
        spread = [each for each in held if each.spread]
        if spread and len(spread) < len(held):
            raise ConfigError("the models of a run are set up with one strategy, ddp or fsdp")
        self.sharded: Any = ShardedModels(held, names) if spread else None
        self.device = world.device
        self.optimizer: Optimizer = self.steppers[0].optimizer
        self.optimizer_state = _OptimizerStates(self.steppers)
        self.registered = LateState(world.device)
        self.disturbance = Disturbance()
        evaluations = [each.evaluation for each in self.steppers if each.evaluation is not None]
        self.evaluation = evaluations[0] if len(evaluations) == len(models) == 1 else None
        self.syncs = any(stepper.update.syncs for stepper in self.steppers)
        self.losses: list[Counted] = []
        self._setups = setups
        self._world_size = world.topology.world_size
        self._recent: deque[tuple[int, int, int, Tensor | None]] = deque(maxlen=RECENT_STEPS)

    @property
    def scaler(self) -> Any:
        """The scale of all losses."""
        return self._setups.scaler

    @property
    def bad_steps(self) -> Tensor:
        """Counts of updates that were not applied; belongs into a checkpoint."""
        assert self._setups.bad_steps is not None
        return self._setups.bad_steps.counts()

    task_log = None  # a loop has no task

    def capture_logged(self, tensors: dict[str, Tensor]) -> Json:
        """Return None: what a loop logs ends with its step."""
        return None

    def before_update(self, do: Callable[[], None]) -> None:
        """Call something once, before the next time that an optimizer's state changes."""
        waiting = [do]

        def once() -> None:
            if waiting:
                waiting.pop()()

        for stepper in self.steppers:
            stepper.update.call_before(once)

    @contextmanager
    def evaluation_weights(self) -> Iterator[None]:
        """Have the weights in the models that evaluations are of."""
        with ExitStack() as stack:
            for stepper in self.steppers:
                if stepper.evaluation is not None:
                    stack.enter_context(stepper.evaluation.in_model())
            yield

    def settle(self) -> None:
        """Let go of gathered parameters."""
        for held in self._setups.held():
            if held.spread:
                held.release()

    def clear_gradients(self) -> None:
        """Forget all gradients."""
        for stepper in self.steppers:
            stepper.clear_gradients()

    def taken(self, epoch: int, start: int, size: int) -> None:
        """Take note of the batch of a step."""
        loss = self.losses[0][0] if self.losses else None
        self._recent.append((epoch, start, size, loss))

    def read(self) -> dict[str, float]:
        """Return the numbers of the last step, over all ranks. Collective: all ranks.

        As `TrainStep.read`; the loss is all that backward passes were of.
        """
        assert self._setups.bad_steps is not None
        loss_sum, weight = summed(self.losses, self.device)
        norms = torch.stack([each.update.grad_norm.double() for each in self.steppers])
        numbers = torch.zeros(6, dtype=torch.float64, device=self.device)
        if loss_sum is not None:
            numbers[0], numbers[1] = loss_sum, weight
        if self._world_size > 1:
            dist.all_reduce(numbers)
        # These are the same on all ranks already.
        numbers[2] = torch.linalg.vector_norm(norms)
        numbers[3:] = self._setups.bad_steps.counts()
        self._setups.bad_steps.look_anew()
        return named_numbers(numbers.tolist())

    def bad_batches(self, step: int) -> list[BadBatch]:
        """Return those of the newest batches that were not applied, oldest first."""
        assert self._setups.bad_steps is not None
        return bad_among(self._setups.bad_steps, list(self._recent), step)


def summed(items: Sequence[Counted], device: torch.device) -> tuple[Tensor | None, Tensor | float]:
    """Return the sum of numbers by what they count, and of the latter; None where there is none."""
    if not items:
        return None, 0.0
    total = torch.zeros((), dtype=torch.float64, device=device)
    weights: Tensor | float = 0.0
    for value, weight in items:
        # A number that counts for nothing may be none.
        if isinstance(weight, Tensor) or weight:
            total = total + value.double() * weight
            weights = weights + weight
    return total, weights


class _Together(nn.Module):
    """Several models as parts of one, for their names in a checkpoint."""

    def __init__(self, models: Mapping[str, nn.Module]) -> None:
        super().__init__()
        for name, model in models.items():
            self.add_module(name, model)


class ShardedModels:
    """What a save asks of models that are spread over the ranks."""

    def __init__(self, held: Sequence[Any], names: Sequence[str]) -> None:
        """Take the models in, each by its name."""
        self._named = Named(held, names)
        self.world_size, self.rank = held[0].world_size, held[0].rank
        self.shapes: dict[str, Any] = {}
        self.tied: dict[str, str] = {}
        for name, each in zip(names, held, strict=True):
            around = f"{name}." if name else ""
            self.shapes |= {around + key: shape for key, shape in each.shapes.items()}
            self.tied |= {around + key: around + to for key, to in each.tied.items()}

    def named_parameters(self) -> Any:
        """Yield this rank's rows of every parameter, by name."""
        return self._named.named_parameters()


class _OptimizerStates:
    """What the optimizers of a run have learned, as that of one."""

    def __init__(self, steppers: Sequence[Stepper]) -> None:
        self._steppers = steppers

    def capture(self, held: Named) -> SavedOptimizer:
        """Return the state of all."""
        each = [stepper.state.capture(held) for stepper in self._steppers]
        if len(each) == 1:
            return each[0]
        tensors: dict[str, Tensor] = {}
        values = []
        for number, saved in enumerate(each):
            tensors |= {_numbered(key, number): item for key, item in saved.tensors.items()}
            values.append(_renamed(saved.values, functools.partial(_numbered, number=number)))
        kind = " and ".join(item["kind"] for item in values)
        return SavedOptimizer(
            tensors, {"kind": kind, "slots": {}, "other": [], "groups": [], "each": values}
        )

    def restore(self, held: Named, saved: SavedOptimizer) -> None:
        """Put the state of all back.

        Raises:
            ConfigError: if there were more or fewer optimizers.
        """
        values = saved.values or {}
        each = values.get("each", [values])
        if len(each) != len(self._steppers):
            raise ConfigError(
                f"the checkpoint is of {plural(len(each), 'optimizer')}, and there are "
                f"{len(self._steppers)}: start a new run in another folder"
            )
        if len(each) == 1:
            self._steppers[0].state.restore(held, saved)
            return
        names = {id(item): name for name, item in held.named_parameters()}
        for number, (stepper, own) in enumerate(zip(self._steppers, each, strict=True)):
            mine = {names[id(item)] for item in stepper.parameters if id(item) in names}
            tensors = {
                _plain(key): item
                for key, item in saved.tensors.items()
                if (
                    key == _numbered(_plain(key), number)
                    if key.startswith(OWN)
                    else parameter_of(key) in mine
                )
            }
            stepper.state.restore(held, SavedOptimizer(tensors, _renamed(own, _plain)))


def _numbered(key: str, number: int) -> str:
    """Return a name of an optimizer's own tensor that no other optimizer's has."""
    return f"{OWN}{number}:{key.removeprefix(OWN)}" if key.startswith(OWN) else key


def _plain(key: str) -> str:
    """Return a name as it was before `_numbered`."""
    return OWN + key.removeprefix(OWN).partition(":")[2] if key.startswith(OWN) else key


def _renamed(value: Json, rename: Callable[[str], str]) -> Json:
    """Return encoded values whose tensors have other names."""
    if isinstance(value, list):
        return [_renamed(item, rename) for item in value]
    if isinstance(value, dict):
        return {
            key: rename(item)
            if key in ("tensor", "ndarray") and isinstance(item, str)
            else _renamed(item, rename)
            for key, item in value.items()
        }
    return value


class LateState(RegisteredState):
    """Objects that are saved with a run, some of them named only after a checkpoint was read."""

    def __init__(self, device: torch.device) -> None:
        """Begin with none."""
        super().__init__(device)
        self._saved: Mapping[str, Json] = {}
        self._tensors: Mapping[str, Tensor] = {}

    def add(self, name: str, item: Stateful) -> None:
        """Save an object with the run from now on; it goes on from what was saved of it."""
        super().add(name, item)
        self._put_back()

    def restore(self, saved: Mapping[str, Json], tensors: Mapping[str, Tensor]) -> list[str]:
        """Have the objects go on that are there, and keep the rest for those that come later."""
        self._saved, self._tensors = (
            dict(saved),
            {name: item for name, item in tensors.items() if name.startswith(REGISTERED)},
        )
        self._put_back()
        return []

    def left_over(self) -> list[str]:
        """Return the names of what was saved, and belongs to nobody."""
        return sorted(self._saved)

    def _put_back(self) -> None:
        here = {name: item for name, item in self._saved.items() if name in self.names}
        if here:
            super().restore(here, self._tensors)
            self._saved = {name: it for name, it in self._saved.items() if name not in here}


class ScheduleState:
    """A schedule of torch's, as a run saves it."""

    def __init__(self, schedule: Any) -> None:
        self._schedule = schedule

    def state_dict(self) -> Any:
        """Return what it knows, without what comes with the code."""
        return portable_state(self._schedule)

    def load_state_dict(self, state: Any) -> None:
        """Go on from a state."""
        load_portable(self._schedule, state)


class LearningRates:
    """The learning rates in the optimizers' groups, which a loop may set by itself.

    Those that the code gives to begin with come from the code, as all hyperparameters do: where it
    gives others than when the run was saved, these hold.
    """

    def __init__(self, steppers: Sequence[Stepper]) -> None:
        """Take note of how the optimizers were built."""
        self._steppers = steppers
        self._built = self._now()

    def _now(self) -> list[list[float]]:
        return [
            [float(group["lr"]) for group in stepper.optimizer.param_groups]
            for stepper in self._steppers
        ]

    def state_dict(self) -> dict[str, Any]:
        """Return the rates of all groups, to begin with and now."""
        return {"built": self._built, "now": self._now()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Set the rates, where the code begins with those that it began with then."""
        if state["built"] != self._built:
            return
        for stepper, rates in zip(self._steppers, state["now"], strict=True):
            for group, rate in zip(stepper.optimizer.param_groups, rates, strict=True):
                if isinstance(group["lr"], Tensor):
                    group["lr"].fill_(rate)
                else:
                    group["lr"] = rate


class NamedStates(MutableMapping[str, Any]):
    """`run.state`: objects by name that are saved with the run."""

    def __init__(self, registered: LateState) -> None:
        self._registered = registered
        self._items: dict[str, Any] = {}

    def __setitem__(self, name: str, item: Any) -> None:
        """Save an object with the run, and put back what was saved of it."""
        if item is self._items.get(name):
            return
        if "/" in name or not name or name in _RESERVED:
            raise ConfigError(f"run.state[{name!r}]: give another name, without a slash")
        self._registered.add(name, item)
        self._items[name] = item

    def __getitem__(self, name: str) -> Any:
        """Return an object."""
        return self._items[name]

    def __delitem__(self, name: str) -> None:
        """Refuse: a checkpoint may hold it already."""
        raise TrainingError(f"run.state[{name!r}] cannot be taken out of a run")

    def __iter__(self) -> Iterator[str]:
        """Yield the names."""
        return iter(self._items)

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self._items)


SCHEDULE, RATES = "schedule", "learning rates"
_RESERVED = (RATES,)
