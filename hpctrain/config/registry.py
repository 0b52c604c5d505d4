"""Models, tasks, optimizers and schedules by name: found, imported, and their arguments checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from hpctrain.config.importing import imported, is_reference
from hpctrain.config.messages import Mistake, config_error
from hpctrain.config.schema import ComponentSection, Config
from hpctrain.config.toml import apply_overrides, read
from hpctrain.errors import ConfigError
from hpctrain.utils.text import did_you_mean

OWN = "module"
"""Name of the task and the optimizer that a model with a `training_step` brings itself."""

BUILTINS: Mapping[str, Mapping[str, str]] = {
    "model": {
        "convnet": "hpctrain.models.convnet:ConvNet",
        "mlp": "hpctrain.models.mlp:MLP",
        "resnet18": "hpctrain.models.resnet:resnet18",
        "resnet20": "hpctrain.models.resnet:resnet20",
        "resnet50": "hpctrain.models.resnet:resnet50",
        "transformer": "hpctrain.models.transformer:Transformer",
    },
    "task": {
        "classification": "hpctrain.training.task.task:Classification",
        "language_modeling": "hpctrain.training.task.language_modeling:LanguageModeling",
        OWN: "hpctrain.training.modules.task:ModuleTask",
        "regression": "hpctrain.training.task.regression:Regression",
    },
    "optimizer": {
        "adafactor": "torch.optim:Adafactor",
        "adagrad": "torch.optim:Adagrad",
        "adam": "torch.optim:Adam",
        "adamw": "torch.optim:AdamW",
        OWN: "hpctrain.training.modules.optimizers:configure",
        "nadam": "torch.optim:NAdam",
        "radam": "torch.optim:RAdam",
        "rmsprop": "torch.optim:RMSprop",
        "sgd": "torch.optim:SGD",
    },
    "scheduler": {
        "chained": "hpctrain.training.optim.schedules:Chained",
        "constant": "hpctrain.training.optim.schedules:constant",
        "cosine": "hpctrain.training.optim.schedules:cosine",
        "inverse_square_root": "hpctrain.training.optim.schedules:inverse_square_root",
        "linear": "hpctrain.training.optim.schedules:linear",
        "multistep": "hpctrain.training.optim.schedules:multistep",
        "one_cycle": "hpctrain.training.optim.schedules:one_cycle",
        "plateau": "hpctrain.training.optim.schedules:Plateau",
        "step": "hpctrain.training.optim.schedules:step_decay",
    },
}
"""Short names, by section. Strings, so that knowing them imports nothing."""

LISTED: Mapping[str, Mapping[str, str]] = {
    "callbacks": {},
    "trackers": {
        "mlflow": "hpctrain.observe.trackers:MLflow",
        "wandb": "hpctrain.observe.trackers:WandB",
    },
}
"""The same, of sections that are lists of tables, such as [[callbacks]]."""

NEEDED = {"mlflow": "mlflow-skinny", "wandb": "wandb"}
"""What pip installs for a tracker; its module has the tracker's own name."""

TRANSFORMS: Mapping[str, Sequence[str]] = {
    "sample_transform": ("fields", "generator", "training"),
    "transform": ("fields", "keys", "training"),
}
"""Keys of `[data]` that name users' own transforms, and what hpctrain passes to these."""


def unknown_name(section: str, use: str) -> str | None:
    """Return what is wrong with a `use` that is neither built in nor an import path."""
    known = {**BUILTINS, **LISTED}[section]
    if use in known or is_reference(use):
        return None
    if not known:
        return 'expected "package.module:Name"'
    module, _, name = use.rpartition(".")
    if is_reference(dotted := f"{module}:{name}"):
        near = f'; did you mean "{dotted}"?'
    else:
        near = did_you_mean(use, known, quote='"')
    names = ", ".join(f'"{name}"' for name in known)
    return f'expected {names}, or an import path "package.module:Name"{near}'


def resolve_all(
    config: Config,
    *,
    given: Callable[[str, Callable[..., Any]], Collection[str]],
    path: str | None = None,
    overrides: Sequence[str] = (),
    without: Collection[str] = (),
) -> dict[str, Callable[..., Any]]:
    """Import every component and check its arguments.

    Args:
        config: whose `model`, `task`, `optimizer` and `scheduler` are wanted. The
            transforms of its data are checked too.
        given: by section and component, the arguments that hpctrain passes itself.
        path: the file that the config was loaded from; with it, mistakes have their lines.
        overrides: those that it was loaded with.
        without: sections that are not wanted.

    Returns:
        By section, what to call with the section's arguments and those given.

    Raises:
        ConfigError: with every mistake in all of them.
    """
    targets: dict[str, Callable[..., Any]] = {}
    mistakes: list[Mistake] = []
    for section in BUILTINS:
        if section in without:
            continue
        component = getattr(config, section)
        try:
            targets[section] = imported(_reference(section, component))
        except ConfigError as error:
            mistakes.append(_mistake(section, component, str(error)))
        else:
            passed = given(section, targets[section])
            mistakes += bind(section, component, targets[section], given=passed)
    for name in TRANSFORMS:
        mistakes += _transform(config, name)[1]
    if mistakes:
        raise placed_error(mistakes, path, overrides)
    return targets


def resolve_listed(
    config: Config, section: str, *, path: str | None = None, overrides: Sequence[str] = ()
) -> list[Callable[..., Any]]:
    """Import what every table of a list names, and check its arguments.

    Args:
        config: whose list it is.
        section: its name, one of LISTED.
        path: the file that the config was loaded from; with it, mistakes have their lines.
        overrides: those that it was loaded with.

    Raises:
        ConfigError: with every mistake in all of them.
    """
    targets: list[Callable[..., Any]] = []
    mistakes: list[Mistake] = []
    for component in getattr(config, section):
        try:
            targets.append(imported(LISTED[section].get(component.use, component.use)))
        except ConfigError as error:
            mistakes.append(_mistake(section, component, str(error)))
        else:
            mistakes += bind(section, component, targets[-1])
    if mistakes:
        raise placed_error(mistakes, path, overrides)
    return targets


def placed_error(
    mistakes: Sequence[Mistake], path: str | None, overrides: Sequence[str]
) -> ConfigError:
    """Return one error with the mistakes and their lines.

    Args:
        mistakes: of a config.
        path: the file that it was loaded from; None: there are no lines.
        overrides: those that it was loaded with.
    """
    if path is not None:
        source = read(path)
        apply_overrides(source, overrides)
        mistakes = [source.place(mistake) for mistake in mistakes]
    return config_error(path or "config", mistakes)


def resolve_transform(config: Config, name: str) -> Callable[..., Any] | None:
    """Import what a key of TRANSFORMS names, a function or a class; None if it names none.

    Raises:
        ConfigError: if it cannot be imported, or its arguments do not fit it.
    """
    target, mistakes = _transform(config, name)
    if mistakes:
        raise config_error("config", mistakes)
    return target


def _transform(config: Config, name: str) -> tuple[Callable[..., Any] | None, list[Mistake]]:
    reference = getattr(config.data, name)
    if reference is None:
        return None, []
    key, arguments_key = ("data", name), ("data", f"{name}_arguments")
    section = ".".join(arguments_key)
    component = ComponentSection(use=reference, arguments=getattr(config.data, f"{name}_arguments"))
    try:
        target = imported(reference)
    except ConfigError as error:
        return None, [Mistake(key=key, problem=str(error), value=reference)]
    # A class is built with its arguments, and its objects are called.
    given = () if isinstance(target, type) else TRANSFORMS[name]
    return target, [
        dataclasses.replace(
            mistake,
            key=key if mistake.key == (section, "use") else (*arguments_key, mistake.key[-1]),
        )
        for mistake in bind(section, component, target, given=given)
    ]


def resolve(section: str, component: ComponentSection) -> Callable[..., Any]:
    """Import what `use` names.

    Raises:
        ConfigError: if the module is not there, or fails to import, or has no such name.
    """
    try:
        return imported(_reference(section, component))
    except ConfigError as error:
        raise config_error("config", [_mistake(section, component, str(error))]) from error


def bind(
    section: str,
    component: ComponentSection,
    target: Callable[..., Any],
    *,
    given: Collection[str] = (),
) -> list[Mistake]:
    """Check a component's arguments against the signature of what it builds.

    Args:
        section: name of the section, for the messages.
        component: its arguments are keyword arguments of `target`.
        target: a class or function.
        given: names of the arguments that hpctrain passes itself.
    """
    import inspect

    try:
        parameters = inspect.signature(target).parameters
    except (TypeError, ValueError):  # written in C without a signature: the call will tell
        return []
    use = component.use
    by_name = {
        name: item
        for name, item in parameters.items()
        if item.kind in (item.POSITIONAL_OR_KEYWORD, item.KEYWORD_ONLY)
    }
    takes_any = any(item.kind is item.VAR_KEYWORD for item in parameters.values())
    free = [name for name in by_name if name not in given]
    own = type(component).__dataclass_fields__
    mistakes = []
    for name, value in component.arguments.items():
        key = (section, "arguments", name) if name in own else (section, name)
        if name in given:
            problem = "hpctrain passes this argument itself"
        elif name in by_name:
            continue
        elif name in parameters and parameters[name].kind is inspect.Parameter.POSITIONAL_ONLY:
            problem = f"{use} takes this by position only, and arguments are passed by name"
        elif takes_any:
            continue
        else:
            near = did_you_mean(name, [*free, *own], prefix=f"{section}.")
            problem = f"{use} has no such argument{near or _listed(free)}"
        mistakes.append(Mistake(key=key, problem=problem, value=value))
    for name, item in parameters.items():
        if item.default is not item.empty or name in given or name in component.arguments:
            continue
        if item.kind is item.POSITIONAL_ONLY:
            problem = f"takes {name!r} by position only, and arguments are passed by name"
            mistakes.append(_mistake(section, component, problem))
        elif name in by_name:
            mistakes.append(Mistake(key=(section, name), problem=f"missing; {use} needs it"))
    mistakes += [
        _mistake(section, component, f"has to take the argument {name!r}, which hpctrain passes")
        for name in given
        if name not in parameters and not takes_any
    ]
    return mistakes


def _listed(names: Sequence[str]) -> str:
    """Return the names to choose from, where they are few."""
    if not names:
        return "; it takes none"
    return f"; it takes {', '.join(names)}" if len(names) <= 12 else ""


def _mistake(section: str, component: ComponentSection, problem: str) -> Mistake:
    return Mistake(key=(section, "use"), problem=problem, value=component.use)


def _reference(section: str, component: ComponentSection) -> str:
    return BUILTINS[section].get(component.use, component.use)
