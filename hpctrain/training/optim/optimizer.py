"""Optimizers: built with fused kernels where these are right, so that bad updates are refused."""

from __future__ import annotations

import fnmatch
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer

from hpctrain.checkpoint.state import HasParameters
from hpctrain.config.schema import ParameterGroup
from hpctrain.errors import ConfigError
from hpctrain.training.optim.ema import begin_training
from hpctrain.utils.text import did_you_mean

_ELEMENTWISE = {
    *("ASGD", "Adadelta", "Adagrad", "Adam", "AdamW", "Adamax"),
    *("NAdam", "RAdam", "RMSprop", "Rprop", "SGD"),
}
# The same of others' packages; compared in tests/unit/training/parallel/test_fsdp.py.
_ELEMENTWISE_OF_OTHERS = {
    ("schedulefree", name) for name in ("AdamWScheduleFree", "RAdamScheduleFree", "SGDScheduleFree")
}
_IN_WORDS = (TypeError, ValueError, RuntimeError)
_OF_CONSTRUCTORS = (*_IN_WORDS, AttributeError, LookupError, AssertionError, ImportError)
OF_CONFIG = "[optimizer] use"
"""Place of an optimizer that the config names, in messages."""
FUSED_KEY = "optimizer.fused = true"

# Who names one of these has chosen an implementation.
_IMPLEMENTATIONS = {"fused", "foreach", "capturable", "differentiable"}


def build_optimizer(
    target: Callable[..., Any],
    model: HasParameters,
    lr: float,
    arguments: Mapping[str, Any],
    *,
    groups: Sequence[ParameterGroup] = (),
    decay_norms_and_biases: bool = True,
) -> Optimizer:
    """Return an optimizer of the trainable parameters.

    Takes the fused kernels where they are known to be right and the user has not chosen: they are
    the fastest, and they look at the flag of a non-finite gradient on the device.

    Args:
        target: a class of torch.optim, or one like them.
        model: on the device, in the dtype that it is trained in; or what this rank holds of it.
        lr: learning rate.
        arguments: further keyword arguments; arrays of the config become tuples.
        groups: parameters that are trained differently.
        decay_norms_and_biases: False: no weight decay on parameters of fewer than two dimensions.

    Raises:
        ConfigError: if there is nothing to train, a pattern fits nothing, or the class refuses its
            arguments, is not a torch optimizer, is one that steps by itself, or is to use fused
            kernels that are not known to be right.
    """
    chosen_groups = parameter_groups(model, groups, decay_norms_and_biases=decay_norms_and_biases)
    parameters = [item for group in chosen_groups for item in group["params"]]
    if not parameters:
        raise ConfigError(
            f"model: {type(model).__name__} has no parameter that requires a gradient: there is "
            "nothing to train"
        )
    chosen = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in arguments.items()
    }
    if _fused_kernels_fit(target, parameters, chosen):
        chosen["fused"] = True
    for group in chosen_groups:
        group["lr"] = lr * group.get(LR_FACTOR, 1.0)
    try:
        # Without a group of its own, the plain list: what any optimizer takes.
        plain = len(chosen_groups) == 1 and chosen_groups[0].keys() == {"params", "lr"}
        optimizer = target(parameters if plain else chosen_groups, lr=lr, **chosen)
    except _OF_CONSTRUCTORS as error:
        reason = str(error) if isinstance(error, _IN_WORDS) else f"{type(error).__name__}: {error}"
        raise ConfigError(f"[optimizer] cannot be built: {reason}") from error
    if not isinstance(optimizer, Optimizer):
        raise ConfigError(
            f"[optimizer] use: {type(optimizer).__name__} is not a torch.optim.Optimizer"
        )
    refuse_unknown_kernels(optimizer)
    refuse_closure(optimizer)
    if "weight_decay" not in optimizer.defaults and any("weight_decay" in g for g in chosen_groups):
        raise ConfigError(
            f"[optimizer] use: {type(optimizer).__name__} has no weight decay: leave out "
            "weight_decay in optimizer.groups, and decay_norms_and_biases"
        )
    prepare_momentum(optimizer)
    begin_training(optimizer)
    return optimizer


def refuse_closure(optimizer: Optimizer, place: str = OF_CONFIG) -> None:
    """Refuse optimizers that evaluate the model by themselves.

    Args:
        optimizer: any.
        place: where it comes from, for the message.

    Raises:
        ConfigError: if its step takes a closure that it cannot do without.
    """
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise ConfigError(
            f"{place}: {type(optimizer).__name__} evaluates the model several times a step by "
            "itself (it needs a closure), which a step over ranks cannot do: take another, or "
            "write the loop yourself, with hpctrain.connect"
        )


def refuse_whole_tensors(optimizer: Optimizer, place: str = OF_CONFIG) -> None:
    """Refuse optimizers that have to see whole tensors, where a rank has some rows of each.

    A class of the user's own says by an attribute `elementwise = True` that every element is
    updated by itself.

    Args:
        optimizer: any.
        place: where it comes from, for the message.

    Raises:
        ConfigError: if the optimizer is not known to work element by element.
    """
    kind = type(optimizer)
    known = (kind.__module__.startswith("torch.optim.") and kind.__name__ in _ELEMENTWISE) or (
        (kind.__module__.partition(".")[0], kind.__name__) in _ELEMENTWISE_OF_OTHERS
    )
    if not (known or getattr(kind, "elementwise", False)):
        raise ConfigError(
            f'{place}: with training.strategy = "fsdp" each rank has some rows of every '
            f"parameter, and {kind.__name__} is not known to update each element by itself. Those "
            f"of torch that do are {', '.join(sorted(_ELEMENTWISE))}; a class of your own says so "
            'by the attribute elementwise = True. With "ddp" any of them trains'
        )


def refuses_on_device(optimizer: Optimizer) -> bool:
    """Tell whether the optimizer looks at `found_inf` itself, without a host sync.

    Source: torch.amp.GradScaler.step, which asks the same.
    """
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def set_learning_rate(optimizer: Optimizer, lr: float) -> None:
    """Set the learning rate of all groups. A plain number: kernels take it along, no copy."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get(LR_FACTOR, 1.0)


def _fused_kernels_fit(
    target: Callable[..., Any], parameters: list[nn.Parameter], arguments: Mapping[str, Any]
) -> bool:
    """Tell whether to ask for fused kernels, of which nobody has spoken."""
    if not inspect.isclass(target) or not issubclass(target, Optimizer):
        return False
    try:
        known = inspect.signature(target).parameters
    except (TypeError, ValueError):  # written in C without a signature
        return False
    # With dampening the first step of SGD differs from the others, see `prepare_momentum`.
    return (
        "fused" in known
        and not arguments.keys() & _IMPLEMENTATIONS
        and not (issubclass(target, SGD) and arguments.get("dampening"))
        and unknown_because(target, parameters) is None
    )


def make_fused(optimizer: Optimizer) -> None:
    """Have an optimizer of torch's own use fused kernels, where these are right.

    Only before its first step, and where nobody has chosen an implementation. What it does then is
    what it would do had it been built with `fused=True`.

    Source: the constructors of torch.optim, read in 2.6 to 2.13; compared in
    tests/unit/training/optim/test_fused.py.
    """
    kind = type(optimizer)
    groups = optimizer.param_groups
    parameters = [item for group in groups for item in group["params"]]
    chosen = any(group.get(name) is not None for group in groups for name in ("fused", "foreach"))
    differs = any(group.get(name) for group in groups for name in ("capturable", "differentiable"))
    dampened = issubclass(kind, SGD) and any(group["dampening"] for group in groups)
    if (
        "fused" not in optimizer.defaults
        or chosen
        or differs
        or dampened
        or _steps_its_own_way(kind)
        or unknown_because(kind, parameters) is not None
    ):
        return
    for values in (optimizer.defaults, *groups):
        values["fused"] = True
    fused: Any = optimizer
    fused._step_supports_amp_scaling = True
    fused._need_device_dtype_check_for_fused = True
    for state in optimizer.state.values():  # Adagrad counts from the beginning, in this dtype
        if isinstance(state.get("step"), Tensor):
            state["step"] = state["step"].to(torch.float32)


def _steps_its_own_way(kind: type[Optimizer]) -> bool:
    """Tell whether a class that inherits from one of torch's has a step of its own."""
    return not kind.step.__module__.startswith("torch.optim.")


def prepare_momentum(optimizer: Optimizer, key: str = FUSED_KEY) -> None:
    """Give fused SGD momentum buffers of zeros where it has none yet.

    It would make them in its first step, uninitialised, and where that step is refused they stay
    so: seen in torch 2.13. From zeros the first step does the same, unless there is dampening.

    Args:
        optimizer: any.
        key: that the user has chosen fused kernels by, for the message.

    Raises:
        ConfigError: if the user asked for fused kernels and dampening.
    """
    if not isinstance(optimizer, SGD) or not refuses_on_device(optimizer):
        return
    for group in optimizer.param_groups:
        if not group["momentum"]:
            continue
        if group["dampening"]:
            raise ConfigError(f"{key}: not together with dampening; leave it out")
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            if state.get("momentum_buffer") is None:
                state["momentum_buffer"] = torch.zeros_like(parameter)


LR_FACTOR = "lr_factor"
"""Key of an optimizer's groups: their learning rate as a factor of the run's."""


def parameter_groups(
    model: HasParameters, groups: Sequence[ParameterGroup], *, decay_norms_and_biases: bool
) -> list[dict[str, Any]]:
    """Return the trainable parameters in groups, as a torch optimizer takes them.

    The first pattern that fits a parameter counts; a weight decay that a pattern gives holds for
    norms and biases too.

    Args:
        model: whose parameters.
        groups: of the config.
        decay_norms_and_biases: False: parameters of fewer than two dimensions, which are the
            scales and shifts of normalisations and all biases, have a weight decay of 0.

    Returns:
        Groups in the order of their first parameters, each with `params` and with what differs
        from the optimizer's own values. Empty if there is nothing to train.

    Raises:
        ConfigError: if a pattern fits no parameter that no pattern before it has taken.
    """
    found: dict[tuple[float, float | None], dict[str, Any]] = {}
    fitting = set()
    names = [name for name, item in model.named_parameters() if item.requires_grad]
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        factor, decay = 1.0, None if decay_norms_and_biases or parameter.ndim > 1 else 0.0
        for index, group in enumerate(groups):
            if fnmatch.fnmatchcase(_without_compile(name), _without_compile(group.pattern)):
                fitting.add(index)
                factor = group.lr_factor
                decay = decay if group.weight_decay is None else group.weight_decay
                break
        made = found.setdefault((factor, decay), {"params": []})
        made["params"].append(parameter)
        if factor != 1:
            made[LR_FACTOR] = factor
        if decay is not None:
            made["weight_decay"] = decay
    for index, group in enumerate(groups):
        if index not in fitting:
            hint = did_you_mean(group.pattern, names, quote='"')
            raise ConfigError(
                f'optimizer.groups.pattern = "{group.pattern}": fits no parameter that is trained '
                f"and that no pattern before it has taken{hint} (names are such as "
                f'"{names[0] if names else "layers.0.weight"}")'
            )
    return list(found.values())


def _without_compile(name: str) -> str:
    """Return a name, or a pattern of names, without what torch.compile has put into it."""
    return name.replace("_orig_mod.", "")


Version = tuple[int, int]

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True, kw_only=True)
class FusedKernels:
    """Kernels of which it is known that they do what the plain optimizer does.

    Attributes:
        optimizers: classes of torch.optim.
        device: type of device.
        dtypes: of the parameters.
        measured: versions of torch whose kernels were compared with the plain optimizers, see
            tests/unit/training/optim/test_fused.py.
        read: first and last version of torch whose source was read, and not run.
    """

    optimizers: tuple[type[Optimizer], ...]
    device: str
    dtypes: tuple[torch.dtype, ...]
    measured: tuple[Version, ...] = ()
    read: tuple[Version, Version] | None = None

    def known_in(self, version: Version) -> bool:
        """Tell whether the kernels of a version of torch were measured or read."""
        return version in self.measured or (
            self.read is not None and self.read[0] <= version <= self.read[1]
        )


FUSED_KERNELS = (
    FusedKernels(
        optimizers=(Adam, AdamW, Adagrad),
        device="cpu",
        dtypes=_FLOATS,
        measured=((2, 13),),
        read=((2, 6), (2, 12)),
    ),
    # In bfloat16 and float16 whole vectors of elements stay as they are, and momentum is read past
    # its end: measured in torch 2.13. Source: pytorch/pytorch issue 191763.
    FusedKernels(
        optimizers=(SGD,),
        device="cpu",
        dtypes=(torch.float64, torch.float32),
        measured=((2, 13),),
        read=((2, 6), (2, 12)),
    ),
    # Not Adagrad: torch 2.11 refuses it on CUDA.
    FusedKernels(
        optimizers=(Adam, AdamW, SGD),
        device="cuda",
        dtypes=_FLOATS,
        read=((2, 6), (2, 13)),
    ),
)
"""All that fused kernels are taken for; what is not here is computed by the plain optimizer."""


def unknown_because(
    kind: type[Optimizer], parameters: Sequence[Tensor], version: Version | None = None
) -> str | None:
    """Return why fused kernels are not known to be right for parameters; None: they are.

    Args:
        kind: class of the optimizer.
        parameters: all that it updates, as it is given them.
        version: of torch; None: the one that runs.
    """
    version = _running_version() if version is None else version
    rows = [row for row in FUSED_KERNELS if issubclass(kind, row.optimizers)]
    if not rows:
        return f"there are none of {kind.__name__} that were compared with the plain optimizer"
    for device, dtype in {(item.device.type, item.dtype) for item in parameters}:
        fitting = [row for row in rows if row.device == device and dtype in row.dtypes]
        if not any(row.known_in(version) for row in fitting):
            return (
                f"of {kind.__name__} on {device} in {str(dtype).removeprefix('torch.')} they are "
                f"not known to compute what the plain optimizer does in torch "
                f"{version[0]}.{version[1]}"
            )
    if not all(_is_dense(item) for item in parameters):
        return (
            "they write past the elements of a parameter that is a view with gaps, such as "
            "every second column of a tensor"
        )
    return None


def refuse_unknown_kernels(optimizer: Optimizer, key: str = FUSED_KEY) -> None:
    """Refuse fused kernels that the user has chosen where they are not known to be right.

    Args:
        optimizer: any.
        key: that the user has chosen them by, for the message.

    Raises:
        ConfigError: naming the reason.
    """
    chosen = [group for group in optimizer.param_groups if group.get("fused")]
    parameters = [item for group in chosen for item in group["params"]]
    reason = unknown_because(type(optimizer), parameters) if chosen else None
    if reason is not None:
        raise ConfigError(
            f"{key}: {reason}. Leave it out: fused kernels are used by themselves wherever they "
            "were measured or read, see docs/training.md"
        )


def _is_dense(tensor: Tensor) -> bool:
    """Tell whether a tensor's elements fill one piece of memory, in any order of dimensions."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return tensor.numel() == 0
        expected *= size
    return True


def _running_version() -> Version:
    found = re.match(r"(\d+)\.(\d+)", torch.__version__)
    assert found is not None
    return int(found[1]), int(found[2])
