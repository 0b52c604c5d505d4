"""Models and optimizers of a loop of one's own, made ready for the world: `world.setup`."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim import Optimizer

from hpctrain.checkpoint.optimizer_state import OptimizerState
from hpctrain.config.capabilities import Combination, unsupported
from hpctrain.config.schema import Precision, TrainingSection
from hpctrain.errors import ConfigError, TrainingError
from hpctrain.launch.process_group import World
from hpctrain.topology import raise_together
from hpctrain.training.ddp import (
    broadcast_model,
    check_equal_shapes,
    take_buffers_of_rank_zero,
)
from hpctrain.training.loops.entry import enter_by
from hpctrain.training.loops.gradients import Reducer
from hpctrain.training.loops.registry import Setups
from hpctrain.training.nonfinite import BadSteps
from hpctrain.training.optim.ema import EvaluationWeights, begin_training, has_modes
from hpctrain.training.optim.optimizer import (
    make_fused,
    prepare_momentum,
    refuse_unknown_kernels,
    refuse_whole_tensors,
)
from hpctrain.training.plain_names import PlainNames
from hpctrain.training.precision import LossScale, NumberFormat
from hpctrain.training.preparation import cast_model, is_spread
from hpctrain.training.snapshot import refuse_unmade
from hpctrain.training.step import Update
from hpctrain.utils.text import plural


class WholeModel:
    """A model of which every rank has all parameters.

    Attributes:
        model: the model itself.
    """

    spread = False

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def named_parameters(self) -> Any:
        """Return all parameters, by plain names."""
        return PlainNames(self.model).of(self.model.named_parameters())


@dataclass(slots=True, kw_only=True)
class Setup:
    """Models that were made ready together, and their optimizers.

    Attributes:
        models: in the order in which they were given.
        held: what this rank has of each.
        optimizers: what steps for each optimizer.
        section: how they are trained.
    """

    models: Sequence[nn.Module]
    held: Sequence[Any]
    optimizers: Sequence[Stepper]
    section: TrainingSection


class Stepper:
    """The update of one optimizer: mean gradients, clipped, refused where they are not finite.

    Takes the place of the optimizer's own `step`, which it calls.

    Attributes:
        optimizer: the optimizer.
        state: what it has learned.
        begun: whether a backward pass has begun by way of the world since the last update.
        steps: updates so far, in this job.
        parameters: of the optimizer, or what this rank holds of them.
        applies: whether the update itself is under way.
        evaluation: its own weights for evaluations; None where it has one set only.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        held: Sequence[Any],
        world: World,
        *,
        section: TrainingSection,
        scaler: LossScale,
        setups: Setups,
    ) -> None:
        self.optimizer = optimizer
        self._setups = setups
        self.begun = False
        self.steps = 0
        self.applies = False
        self.plain_step = optimizer.step
        self._zero_grad = optimizer.zero_grad
        self._scaler = scaler
        self._sharded = [item for item in held if not isinstance(item, WholeModel)]
        self.parameters = [item for group in optimizer.param_groups for item in group["params"]]
        self._reducer = Reducer(self.parameters, world.topology.world_size, setups.group)
        self._whole = {id(item) for each in self._sharded for item in each.whole_parameters()}
        self._rank, self._world_size = world.topology.rank, world.topology.world_size
        self._modules = [list(each.model.modules()) for each in held]
        self.state = OptimizerState(optimizer, rows=bool(self._sharded))
        self.evaluation = (
            EvaluationWeights(optimizer, Named(held)) if has_modes(optimizer) else None
        )
        offloaded = any(each.offloaded for each in self._sharded)
        self.update = Update(
            optimizer,
            clip_norm=section.clip_norm,
            clip_value=section.clip_value,
            scaler=scaler,
            device=torch.device("cpu") if offloaded else world.device,
            counted=self._counted if self._sharded else None,
            reduce_norm=self._sharded[0].reduce_norm if self._sharded else None,
        )
        assert setups.bad_steps is not None
        self.update.bad_steps = setups.bad_steps
        self._uncounted = 0

    def take_over(self) -> None:
        """Have `optimizer.step()` and `optimizer.zero_grad()` be ours."""
        optimizer: Any = self.optimizer
        optimizer.step = types.MethodType(_step_of(self), optimizer)
        if self._sharded:
            optimizer.zero_grad = types.MethodType(_zero_grad_of(self), optimizer)

    def expect(self, loss: Tensor | None) -> None:
        """Reduce beside the backward pass that follows, the last before `apply`. Collective.

        Args:
            loss: what it begins with; None: this rank has no samples.
        """
        if not self._sharded:  # gradients of rows are reduced in any backward pass
            self._reducer.expect(loss)

    def apply(self, factor: Tensor | None = None) -> None:
        """Update the parameters by the mean of all ranks' gradients. Collective: all ranks.

        Args:
            factor: by which the gradients are too small, (); None: they are not.

        Raises:
            TrainingError: on this rank, if the gradients are not those of scaled losses where they
                have to be.
        """
        if self._scaler.enabled and not self.begun:
            raise TrainingError(
                'precision "16-mixed" scales losses before their backward pass: call '
                "world.backward(loss) or run.backward(loss) in place of loss.backward()"
            )
        if self._setups.is_idle and not self.begun:
            self._refuse_or_forget()
        self.begun = False
        gradients = self._gathered() if self._sharded else self._reducer.reduce()
        self.applies = True  # what a scheduler has put around `step` stays around it
        try:
            self.update.apply(gradients, None, factor)
        finally:
            self.applies = False
        for each in self._sharded:
            each.release()
            each.count_uses_anew()
        if self._world_size > 1:
            for modules in self._modules:
                take_buffers_of_rank_zero(modules, self._rank)  # as DistributedDataParallel does
        self.steps += 1

    def _refuse_or_forget(self) -> None:
        """See to it that the held sample of a rank without others counts for nothing.

        Raises:
            TrainingError: on this rank, where its gradients are in all ranks' already.
        """
        if self._sharded:
            raise TrainingError(
                "this rank has no samples in this batch, and its held one counted as much as any: "
                "call world.backward(loss, samples=batch.size) in place of loss.backward()"
            )
        for item in self.parameters:
            item.grad = None

    def clear_gradients(self, *, set_to_none: bool = True) -> None:
        """Forget the gradients of all parameters of this optimizer."""
        self._zero_grad(set_to_none=set_to_none)
        for each in self._sharded:
            each.clear_gradients()

    def _gathered(self) -> list[Tensor]:
        """Return this rank's rows of the gradients, and those of what every rank has."""
        if not self.steps:
            for each in self._sharded:
                each.find_rows()
        found: list[Tensor] = []
        whole: list[Tensor] = []
        for each in self._sharded:
            each.reduce_whole()
            each.gradients()
        for item in self.parameters:
            if item.grad is not None:
                (whole if id(item) in self._whole else found).append(item.grad)
        self._uncounted = len(whole) if self._rank else 0
        return found + whole

    def _counted(self, gradients: list[Tensor]) -> list[Tensor]:
        return gradients[: len(gradients) - self._uncounted]


def _step_of(stepper: Stepper) -> Callable[..., Any]:
    def step(_optimizer: Optimizer, closure: Callable[[], Any] | None = None) -> Any:
        """Average the gradients over the ranks, clip them, and update. Collective: all ranks."""
        if stepper.applies:
            return stepper.plain_step()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        stepper.apply()
        return loss

    return step


def _zero_grad_of(stepper: Stepper) -> Callable[..., None]:
    def zero_grad(_optimizer: Optimizer, set_to_none: bool = True) -> None:
        """Forget the gradients, where torch keeps those of rows as well."""
        stepper.clear_gradients(set_to_none=set_to_none)

    return zero_grad


class Named:
    """Parameters of one or several models, by names that no two of them share."""

    def __init__(self, held: Sequence[Any], names: Sequence[str] = ()) -> None:
        """Take the models in.

        Args:
            held: what this rank has of each.
            names: of the models; none: one of them has no name, and several are numbered.
        """
        self._held = held
        self._names = names or _numbered(len(held))

    def named_parameters(self) -> Any:
        """Yield the parameters by name."""
        for name, held in zip(self._names, self._held, strict=True):
            around = f"{name}." if name else ""
            for inner, item in held.named_parameters():
                yield around + inner, item


def _numbered(count: int) -> list[str]:
    return [""] if count == 1 else [str(number) for number in range(count)]


def set_up(
    world: World,
    setups: Setups,
    objects: Sequence[Any],
    section: TrainingSection,
) -> Setup:
    """Make models and optimizers ready. Collective: all ranks.

    Args:
        world: the ranks.
        setups: all of the world; the new one is added.
        objects: models and optimizers of their parameters.
        section: how they are trained.

    Raises:
        ConfigError: on every rank, if they do not fit together, or the world cannot train so.
    """
    models = [item for item in objects if isinstance(item, nn.Module)]
    optimizers = [item for item in objects if isinstance(item, Optimizer)]
    with raise_together(world.communicator):
        _check_objects(objects, models, setups)
        _check_capabilities(section, world)
        _check_optimizers(optimizers, models)
        scaler = _scaler(section, world, setups, optimizers)
        number_formats = [_placed(model, section, world) for model in models]
        _refuse_lost(optimizers, models)
    spread = is_spread(section, world.topology.world_size)
    held: list[Any] = []
    for model, number_format in zip(models, number_formats, strict=True):
        check_equal_shapes(model, world)
        if world.topology.world_size > 1:
            broadcast_model(world, model)  # as DistributedDataParallel does
        held.append(_spread(model, section, number_format, world, optimizers) if spread else None)
        enter_by(model, number_format, held[-1])
        held[-1] = held[-1] or WholeModel(model)
    with raise_together(world.communicator):
        for optimizer in optimizers:
            if spread:
                refuse_whole_tensors(optimizer)
            _place_state(optimizer)
            make_fused(optimizer)
            prepare_momentum(optimizer)
            begin_training(optimizer)
    if setups.bad_steps is None:
        setups.bad_steps = BadSteps(world.device)
    setups.scaler = scaler
    steppers = [
        Stepper(
            optimizer,
            [each for each in held if _has_some_of(each, optimizer)],
            world,
            section=section,
            scaler=scaler,
            setups=setups,
        )
        for optimizer in optimizers
    ]
    for stepper in steppers:
        stepper.take_over()
    setup = Setup(models=models, held=held, optimizers=steppers, section=section)
    setups.all.append(setup)
    return setup


def _check_objects(objects: Sequence[Any], models: Sequence[nn.Module], setups: Setups) -> None:
    for item in objects:
        kind = type(item).__name__
        if not isinstance(item, nn.Module | Optimizer):
            raise ConfigError(
                f"world.setup takes torch.nn.Modules and their torch optimizers, not {kind}; "
                "schedules go to world.run(schedule=...)"
            )
        if isinstance(item, DistributedDataParallel | DataParallel):
            raise ConfigError(f"world.setup wants the model itself: pass the module inside {kind}")
        if any(item is known for known in setups.models()):
            raise ConfigError(f"{kind} was set up before: world.setup once for every model")
        if any(item is known.optimizer for known in setups.steppers()):
            raise ConfigError(f"{kind} was set up before: world.setup once for every optimizer")
    if not models:
        raise ConfigError("world.setup needs a model: net, optimizer = world.setup(net, optimizer)")
    for model in models:
        refuse_unmade(model)


def _check_capabilities(section: TrainingSection, world: World) -> None:
    found = unsupported(
        Combination(
            precision=section.precision,
            device=world.device.type,
            backend=world.backend,
            strategy=section.strategy,
            cpu_offload=section.cpu_offload,
        ),
        torch=torch.__version__,
    )
    if found is not None:
        key, because = found
        raise ConfigError(f"{key.partition('.')[2]}: {because}")


def _check_optimizers(optimizers: Sequence[Optimizer], models: Sequence[nn.Module]) -> None:
    owned: dict[int, str] = {}
    known = {id(item) for model in models for item in model.parameters()}
    for optimizer in optimizers:
        kind = type(optimizer).__name__
        closure = inspect.signature(type(optimizer).step).parameters.get("closure")
        if closure is not None and closure.default is closure.empty:
            raise ConfigError(
                f"{kind} evaluates the model several times a step by itself (it needs a closure), "
                "which a step over ranks cannot do"
            )
        refuse_unknown_kernels(optimizer)
        items = [item for group in optimizer.param_groups for item in group["params"]]
        strangers = sum(id(item) not in known for item in items)
        if strangers:
            raise ConfigError(
                f"{kind} has {plural(strangers, 'parameter')} of a model that was not given: give "
                f"all of its models, as in world.setup(actor, critic, optimizer)"
            )
        for item in items:
            if (other := owned.setdefault(id(item), kind)) != kind:
                raise ConfigError(f"{kind} and {other} have the same parameters")


def _scaler(
    section: TrainingSection, world: World, setups: Setups, optimizers: Sequence[Optimizer]
) -> LossScale:
    """Return the scale of all losses of the world.

    Raises:
        ConfigError: if several optimizers would share one scale, which each of them would change.
    """
    scaled = NumberFormat.of(section.precision, world.device).scaled
    before = setups.scaler
    several = len(optimizers) + len(setups.steppers()) > 1
    if (scaled or (before is not None and before.enabled)) and several:
        raise ConfigError(
            'precision "16-mixed" has one loss scale, and several optimizers would each change it: '
            'take precision="bf16-mixed"'
        )
    return LossScale(world.device, enabled=scaled) if before is None or scaled else before


def _placed(model: nn.Module, section: TrainingSection, world: World) -> NumberFormat:
    """Put a model on the device, in its format; where it is to be spread it stays on the host."""
    spread = is_spread(section, world.topology.world_size)
    number_format = NumberFormat.of(section.precision, world.device)
    cast_model(model, number_format, None if spread else world.device)
    return number_format if number_format.casts else number_format.for_model(model)


def _refuse_lost(optimizers: Sequence[Optimizer], models: Sequence[nn.Module]) -> None:
    """Refuse a model whose parameters are other objects on the device than on the host."""
    _check_optimizers(optimizers, models)


def _spread(
    model: nn.Module,
    section: TrainingSection,
    number_format: NumberFormat,
    world: World,
    optimizers: Sequence[Optimizer],
) -> Any:
    """Spread a model over the ranks, and have its optimizers update this rank's rows."""
    from hpctrain.training.fsdp import ShardedModel

    plain = PlainNames(model)
    names = {id(item): plain(name) for name, item in model.named_parameters()}
    with raise_together(world.communicator):
        sharded = ShardedModel(model, section, number_format, world)
    sharded.refresh()
    rows = dict(sharded.named_parameters())
    for optimizer in optimizers:
        replace_parameters(optimizer, {key: rows[name] for key, name in names.items()})
    return sharded


def _has_some_of(held: Any, optimizer: Optimizer) -> bool:
    own = {id(item) for group in optimizer.param_groups for item in group["params"]}
    return any(id(item) in own for _, item in held.named_parameters())


def replace_parameters(optimizer: Optimizer, by_id: Mapping[int, nn.Parameter]) -> None:
    """Have an optimizer update other tensors in place of those that it was built with.

    What it has kept of one since it was built is kept of its rows: as many as there are here.

    Args:
        optimizer: changed in place.
        by_id: what stands in place of a parameter, by its id.
    """
    for group in optimizer.param_groups:
        group["params"] = [by_id.get(id(item), item) for item in group["params"]]
    for old in list(optimizer.state):
        if id(old) in by_id:
            new = by_id[id(old)]
            kept = optimizer.state.pop(old)
            if any(isinstance(item, Tensor) and item.ndim for item in kept.values()):
                # Adagrad and its like begin with the same number everywhere.
                kept = {
                    key: item.new_full(new.shape, item.flatten()[0].item())
                    if isinstance(item, Tensor) and item.shape == old.shape and item.numel()
                    else item
                    for key, item in kept.items()
                }
            optimizer.state[new] = kept


def _place_state(optimizer: Optimizer) -> None:
    """Put what an optimizer has kept since it was built beside its parameters."""
    for parameter, kept in optimizer.state.items():
        if isinstance(parameter, Tensor) and isinstance(kept, dict):
            for key, item in kept.items():
                if isinstance(item, Tensor) and item.shape == parameter.shape and item.ndim:
                    kept[key] = item.to(parameter.device)


def section_for(
    *,
    precision: Precision,
    training: Mapping[str, Any],
    clip_norm: float | None,
    clip_value: float | None,
) -> TrainingSection:
    """Return how models are trained, as a config would say it."""
    for name, value in (("clip_norm", clip_norm), ("clip_value", clip_value)):
        if value is not None and not value > 0:
            raise ConfigError(f"{name} = {value}: expected a number above 0, or None")
    return TrainingSection(
        max_steps=1,
        precision=precision,
        clip_norm=clip_norm,
        clip_value=clip_value,
        **training,
    )
