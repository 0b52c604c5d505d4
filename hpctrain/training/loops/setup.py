"""`world.setup`: models and optimizers of an own loop made ready: device, precision, strategy."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim import Optimizer

from hpctrain.config.capabilities import Combination, unsupported
from hpctrain.config.schema import Precision, TrainingSection
from hpctrain.data.loading.batch import map_tensors
from hpctrain.errors import ConfigError, TrainingError
from hpctrain.launch.process_group import World
from hpctrain.topology import raise_together
from hpctrain.training.checkpointing.snapshot import refuse_unmade
from hpctrain.training.loops.registry import Setups
from hpctrain.training.loops.stepper import Stepper, WholeModel
from hpctrain.training.model.precision import LossScale, NumberFormat
from hpctrain.training.model.preparation import cast_model, is_spread
from hpctrain.training.model.wrappers import PlainNames
from hpctrain.training.nonfinite import BadSteps
from hpctrain.training.optim.ema import begin_training
from hpctrain.training.optim.optimizer import (
    make_fused,
    prepare_momentum,
    refuse_unknown_kernels,
    refuse_whole_tensors,
)
from hpctrain.training.parallel.ddp import (
    broadcast_model,
    check_equal_shapes,
)
from hpctrain.training.parallel.fsdp import ShardedModel
from hpctrain.utils.text import plural


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
    from hpctrain.training.parallel.fsdp import ShardedModel

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


_ENTRY = "_hpctrain_entry"
_NARROW = (torch.bfloat16, torch.float16)


def enter_by(model: nn.Module, number_format: NumberFormat, sharded: ShardedModel | None) -> None:
    """Have a model's forward pass and its other methods do what format and strategy need.

    Args:
        model: changed in place; where nothing is needed, not at all.
        number_format: of parameters and arithmetic.
        sharded: the same model where its parameters are spread over the ranks, else None.
    """
    is_plain = number_format.autocast is None and not number_format.casts
    if sharded is None and is_plain:
        return
    kind = type(model)
    members: dict[str, Any] = {name: _entering(method) for name, method in _methods(kind)}
    members |= {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    if sharded is not None:
        members["__deepcopy__"] = _refuse_copy
    model.__dict__[_ENTRY] = Entry(number_format, sharded)
    model.__class__ = type(kind.__name__, (kind,), members)
    for name, child in model.named_children() if sharded is not None else ():
        if any(True for _ in child.parameters()):
            child.register_forward_pre_hook(functools.partial(_refuse_part, model, name))


class Entry:
    """What happens around a call of a model from outside of it."""

    def __init__(self, number_format: NumberFormat, sharded: ShardedModel | None) -> None:
        self.inside = False
        self._format = number_format
        self._sharded = sharded

    def __deepcopy__(self, memo: Any) -> Entry:
        """Return that of a copy of the model."""
        return Entry(self._format, self._sharded)

    def run(self, method: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Return what a method of the model makes of its arguments. Under FSDP, collective."""
        if self._format.casts:
            args, kwargs = map_tensors(self._cast, (args, kwargs))
        with self._entered(), self._format.arithmetic():
            if self._sharded is None:
                result = method(*args, **kwargs)
            else:

                def of_bare(_model: nn.Module, _fields: Mapping[str, Tensor]) -> Any:
                    return method(*args, **kwargs)

                result = self._sharded.root(of_bare, {})
        # Sums of many numbers, as losses are, need more than 8 or 11 bits.
        return map_tensors(_wide, result)

    def _cast(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._format.fitting(tensor.dtype))

    @contextmanager
    def _entered(self) -> Iterator[None]:
        self.inside = True
        try:
            yield
        finally:
            self.inside = False


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in _NARROW else tensor


def _methods(kind: type) -> Iterator[tuple[str, Callable[..., Any]]]:
    """Yield the public methods that a model has beyond those of every module, and its forward."""
    found: dict[str, Callable[..., Any]] = {}
    for each in kind.__mro__[: kind.__mro__.index(nn.Module)]:
        for name, member in vars(each).items():
            if name.startswith("_") or (hasattr(nn.Module, name) and name != "forward"):
                continue
            if inspect.isfunction(member) and not inspect.isgeneratorfunction(member):
                found.setdefault(name, member)
    yield from found.items()


def _entering(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a method that enters the model, unless it is called from inside of it."""

    @functools.wraps(function)
    def method(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        entry: Entry = self.__dict__[_ENTRY]
        if entry.inside:
            return function(self, *args, **kwargs)
        return entry.run(functools.partial(function, self), args, kwargs)

    return method


def _refuse_copy(self: nn.Module, memo: Any) -> nn.Module:
    """Refuse a copy that would hold this rank's rows, and gather nothing."""
    raise TrainingError(
        f'{type(self).__name__} has its parameters spread over the ranks (strategy "fsdp") and '
        'cannot be copied: copy it before world.setup, or take strategy="ddp"'
    )


def _refuse_part(model: nn.Module, name: str, child: nn.Module, _args: Any) -> None:
    """Refuse a part of a spread model that is called by itself: it has only rows."""
    # A backward pass runs parts again whose activations were not kept.
    is_backward = torch._C._current_graph_task_id() != -1
    if not (model.__dict__[_ENTRY].inside or is_backward):
        kind = type(model).__name__
        raise TrainingError(
            f"{kind}.{name} was called by itself, and has only some rows of its parameters "
            f'(strategy "fsdp"), which are gathered for calls of {kind}: put the call into a '
            f'method of {kind}, or take strategy="ddp"'
        )
