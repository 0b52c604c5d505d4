"""Trial of an optimizer on small stand-ins of the parameters, before a run relies on it.

Steps on them show what it keeps, and whether a copy that is put back from it goes on alike. So what
a checkpoint could not hold is named before the first step, and not after an hour.
"""

from __future__ import annotations

import fnmatch
import io
import json
import random
import types
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from hpctrain.checkpoint.optimizer_state import OWN, OptimizerState, SavedOptimizer, slot_names
from hpctrain.checkpoint.state import HasParameters, UnsavableError
from hpctrain.config.schema import ParameterGroup, SchedulerSection
from hpctrain.errors import CheckpointError, ConfigError
from hpctrain.training.compiler import as_written
from hpctrain.training.model.undisturbed import kept_generators
from hpctrain.training.optim.ema import EvaluationWeights, has_modes
from hpctrain.training.optim.optimizer import OF_CONFIG


@dataclass(frozen=True, slots=True, kw_only=True)
class TriedOptimizer:
    """What a trial has shown.

    Attributes:
        name: of the optimizer's class.
        slots: that it keeps of some parameters after one step, by the parameters' names.
        learns: whether it keeps more than slots of parameters.
        follows_lr: whether a step depends on the `lr` of its `param_groups`.
        place: where it comes from, for messages.
    """

    name: str
    slots: Mapping[str, frozenset[str]]
    learns: bool
    follows_lr: bool
    place: str = OF_CONFIG

    def check_schedule(self, scheduler: SchedulerSection, groups: Sequence[ParameterGroup]) -> None:
        """Refuse learning rates that change nothing.

        Raises:
            ConfigError: naming the key.
        """
        ignored = None
        warmup = scheduler.warmup_steps or scheduler.warmup_epochs or scheduler.warmup_samples
        if scheduler.use != "constant" or warmup:
            ignored = f'[scheduler] use = "{scheduler.use}"'
        elif any(group.lr_factor != 1 for group in groups):
            ignored = "[[optimizer.groups]] lr_factor"
        self.check_rates(ignored)

    def check_rates(self, ignored: str | None) -> None:
        """Refuse what sets learning rates that the optimizer does not read.

        Args:
            ignored: what sets them; None: nothing does.

        Raises:
            ConfigError: naming it.
        """
        if ignored is not None and not self.follows_lr:
            raise ConfigError(
                f"{ignored}: {self.name} does not read `lr` in its `param_groups` when it steps, "
                "so that this would change nothing: leave it out, or take another optimizer"
            )

    def check(self, saved: SavedOptimizer) -> None:
        """Compare a checkpoint with what the optimizer, as it is built today, goes on from.

        Raises:
            CheckpointError: if it lacks something.
            ConfigError: if 0.1.0 has saved it, and not all of what such an optimizer learns.
        """
        if saved.values is None and self.learns:
            raise ConfigError(
                f"optimizer.use: this run was begun by hpctrain 0.1.0, which did not save all that "
                f"{self.name} has learned: it would go on as another run. Begin a new one with "
                "another run.name, and checkpoint.initialize_from for its weights"
            )
        there = slot_names(saved)
        for name, wanted in self.slots.items():
            missing = sorted(wanted - there.get(name, wanted))
            if missing:
                before = "" if saved.values is None else f", which is of {saved.values['kind']}"
                raise CheckpointError(
                    f"{self.name}, built as {self.place} says today, needs "
                    f"{', '.join(missing)} of {name}, and the checkpoint{before}, has none: bring "
                    "the old optimizer back, or begin a new run with checkpoint.initialize_from"
                )


GroupOf = Callable[[str, nn.Parameter], object]
"""(name, parameter) to what marks its group."""


def by_pattern(groups: Sequence[ParameterGroup]) -> GroupOf:
    """Return what marks the groups of a config."""

    def group_of(name: str, parameter: nn.Parameter) -> object:
        fits = [fnmatch.fnmatchcase(name, group.pattern) for group in groups]
        return fits.index(True) if True in fits else None

    return group_of


def try_optimizer(
    build: Callable[[HasParameters], Optimizer],
    model: HasParameters,
    group_of: GroupOf,
    *,
    rows: bool,
    ranks: int = 1,
    place: str = OF_CONFIG,
) -> TriedOptimizer | None:
    """Take steps on stand-ins, save the optimizer, put it back, and go on with both.

    Generators and the optimizer of the run are left as they are.

    Args:
        build: makes an optimizer as that of the run.
        model: names the parameters of the run.
        group_of: marks parameters that are trained differently.
        rows: whether a rank holds some rows of each parameter only.
        ranks: that take the same steps.
        place: where the optimizer comes from, for messages.

    Returns:
        What it has shown; None if no optimizer can be built of stand-ins.

    Raises:
        ConfigError: if steps need more than gradients, or what the optimizer keeps cannot be saved.
    """
    stand_ins = StandIns.of(model, group_of)
    device = next(iter(stand_ins.parameters.values())).device
    # What it prints when it is built was printed when the run's own was.
    with kept_generators(device), as_written(), redirect_stdout(io.StringIO()):
        try:
            optimizer = build(stand_ins)
        except ConfigError:
            return None  # the run's own could be: it is looked at after its first step
        return _Trial(build, stand_ins, optimizer, rows=rows, ranks=ranks, place=place).run()


class _Trial:
    def __init__(
        self,
        build: Callable[[HasParameters], Optimizer],
        stand_ins: StandIns,
        optimizer: Optimizer,
        *,
        rows: bool,
        ranks: int,
        place: str,
    ) -> None:
        self._place = place
        self._drifts = ranks > 1 and not rows
        self._build = build
        self._stand_ins = stand_ins
        self._optimizer = optimizer
        self._rows = rows
        self._name = type(optimizer).__name__
        self._state = OptimizerState(optimizer, rows=rows)

    def run(self) -> TriedOptimizer:
        self._step(self._optimizer, self._stand_ins, 1)
        first = self._saved()
        attributes = Attributes(self._optimizer)
        self._step(self._optimizer, self._stand_ins, 2)
        saved = self._saved()
        if changed := attributes.changed():
            raise ConfigError(
                f"{self._place}: {self._name} changes its attribute {', '.join(changed)} at each "
                "step, which no checkpoint holds: keep that in its `state`, under any key, or in "
                "`param_groups`, which are saved"
            )
        if self._rows:
            self._require_rows(saved)
        self._try_modes(saved)
        follows_lr = self._go_on(saved)
        assert first.values is not None
        assert saved.values is not None
        learned = any(
            group["learned"] or group["arguments"] for group in saved.values["groups"]
        ) or bool(saved.values["other"])
        tolerant = isinstance(self._optimizer, SGD)  # makes the momentum that it lacks
        return TriedOptimizer(
            name=self._name,
            slots={} if tolerant else slot_names(first),
            learns=learned,
            follows_lr=follows_lr,
            place=self._place,
        )

    def _step(self, optimizer: Optimizer, stand_ins: StandIns, number: int) -> None:
        stand_ins.give_gradients(number)
        seed_all(number)
        drawn, rates = generator_states(), _rates(optimizer)
        try:
            optimizer.step()
        except Exception as error:
            raise ConfigError(
                f"{self._place}: {self._name} cannot take a step that is given gradients and no "
                f"closure: {type(error).__name__}: {error}. One that evaluates the model by itself "
                "cannot be used"
            ) from error
        if _rates(optimizer) != rates:
            raise ConfigError(
                f"{self._place}: {self._name} changes `lr` itself, which is set before a step, "
                "as optimizer.lr and the schedule say: let it keep a factor of its own"
            )
        if self._drifts and generator_states() != drawn:
            raise ConfigError(
                f"{self._place}: {self._name} draws random numbers in its steps, and every rank "
                "draws its own: the parameters of the ranks would drift apart. Train on one rank, "
                "or let it draw by what all ranks know, such as the number of the step"
            )

    def _saved(self) -> SavedOptimizer:
        try:
            saved = self._state.capture(self._stand_ins)
        except UnsavableError as error:
            raise ConfigError(
                f"{self._place}: {error}. Keep what counts as tensors, numbers and texts"
            ) from error
        memory = {
            item.untyped_storage().data_ptr(): name
            for name, item in self._stand_ins.named_parameters()
            if item.numel()
        }
        for key, tensor in saved.tensors.items():
            if tensor.numel() and (name := memory.get(tensor.untyped_storage().data_ptr())):
                raise ConfigError(
                    f"{self._place}: {self._name} keeps the memory of the parameter {name} as "
                    f"{key}, and would not share it after a restart: keep a copy"
                )
        return SavedOptimizer(
            {key: item.clone() for key, item in saved.tensors.items()},
            json.loads(json.dumps(saved.values)),
        )

    def _require_rows(self, saved: SavedOptimizer) -> None:
        shapes = {name: item.shape for name, item in self._stand_ins.named_parameters()}
        for key, tensor in saved.tensors.items():
            name = next((name for name in shapes if f"/{name}/" in key), None)
            alike = name is not None and tensor.shape == shapes[name] and not key.startswith(OWN)
            if tensor.ndim and not alike:
                raise ConfigError(
                    f"{self._place}: {self._name} keeps {key}, which has not the shape of a "
                    'parameter: with training.strategy = "fsdp" each rank has some rows of the '
                    'parameters, and its own numbers here. Use "ddp"'
                )

    def _try_modes(self, saved: SavedOptimizer) -> None:
        if not has_modes(self._optimizer):
            return
        with EvaluationWeights(self._optimizer, self._stand_ins).in_model():
            pass
        after = self._saved()
        if after.values != saved.values or not _same(after.tensors, saved.tensors):
            raise ConfigError(
                f"{self._place}: the state of {self._name} is another one after eval() and "
                "train(): a run would depend on how often it is evaluated"
            )

    def _go_on(self, saved: SavedOptimizer) -> bool:
        """Compare a step of the optimizer with one of a copy that comes from what was saved.

        Returns:
            Whether half the learning rate makes another step of it.
        """
        before = self._stand_ins.copy()
        self._step(self._optimizer, self._stand_ins, 3)
        copies = [self._copy(before.copy(), saved) for _ in range(2)]
        # Where two copies of one state differ the device itself does not compute alike.
        if not self._stand_ins.equal(copies[0]) and copies[0].equal(copies[1]):
            raise ConfigError(
                f"{self._place}: {self._name} goes on in another way after a restart, though its "
                "`state` and `param_groups` are put back: it keeps something elsewhere"
            )
        # Where the step changes nothing, as at a tiny rate, it shows nothing either.
        unmoved = copies[0].equal(before)
        return unmoved or not copies[0].equal(self._copy(before.copy(), saved, lr_factor=0.5))

    def _copy(self, stand_ins: StandIns, saved: SavedOptimizer, lr_factor: float = 1) -> StandIns:
        optimizer = self._build(stand_ins)
        OptimizerState(optimizer, rows=self._rows).restore(stand_ins, saved)
        if lr_factor != 1:
            for group in optimizer.param_groups:
                group["lr"] = group.get("lr", 1.0) * lr_factor
        self._step(optimizer, stand_ins, 3)
        return stand_ins


def _same(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(torch.nan_to_num(item), torch.nan_to_num(second[name]))
        for name, item in first.items()
    )


def _rates(optimizer: Optimizer) -> list[float]:
    return [float(group.get("lr", 0.0)) for group in optimizer.param_groups]


_LONGEST, _FEWEST = 64, 4
_MOST_ELEMENTS = 2**16


class StandIns:
    """Small parameters under the names of a model's: one of each kind that it has."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.parameters = dict(parameters)

    @classmethod
    def of(cls, model: HasParameters, group_of: GroupOf) -> StandIns:
        """Make them: a kind is a group, a number of dimensions, a dtype and a device."""
        found: dict[tuple[object, ...], tuple[str, nn.Parameter]] = {}
        for name, item in model.named_parameters():
            if item.requires_grad:
                flat = 1 in item.shape or not item.numel()
                kind = (group_of(name, item), item.ndim, item.dtype, item.device, flat)
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


_DEEPEST = 6
_SAVED = ("state", "param_groups", "defaults")  # the last are what the groups began with
_WITHOUT_STATE = (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType)


class Attributes:
    """The attributes of an optimizer at one moment, but for what a checkpoint holds of it."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._before = self._prints()

    def changed(self) -> list[str]:
        """Return the names of those that are not what they were."""
        now = self._prints()
        return sorted(name for name in now if now[name] != self._before.get(name))

    def _prints(self) -> dict[str, object]:
        optimizer = self._optimizer
        groups, slots = optimizer.param_groups, list(optimizer.state.values())
        known = [optimizer, optimizer.state, groups, *groups, *slots]
        for content in (*groups, *slots):
            known += content.values() if isinstance(content, dict) else ()
        known += [item for group in groups for item in group["params"]]
        return {
            name: _print(value, set(map(id, known)), 0)
            for name, value in vars(optimizer).items()
            if name not in _SAVED
        }


def _print(value: Any, seen: set[int], depth: int) -> object:
    """Return what shows whether a value has changed, as far as its parts can be seen."""
    if value is None or isinstance(value, bool | int | float | complex | str | bytes):
        return repr(value)
    if id(value) in seen or depth > _DEEPEST or isinstance(value, _WITHOUT_STATE):
        return None
    seen.add(id(value))
    if isinstance(value, Tensor):
        return None if value.device.type == "meta" else repr(value.detach().tolist())
    return [(key, _print(item, seen, depth + 1)) for key, item in _parts(value)]


def _parts(value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, torch.Generator):
        return [("state", value.get_state())]
    if isinstance(value, random.Random):
        return [("state", value.getstate())]
    if isinstance(value, np.random.Generator):
        return [("state", value.bit_generator.state)]
    if isinstance(value, Mapping):
        return [(repr(key), item) for key, item in value.items()]
    if isinstance(value, list | tuple | deque | set | frozenset):
        return [("", item) for item in value]
    return list(vars(value).items()) if hasattr(value, "__dict__") else []
