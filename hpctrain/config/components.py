"""Models, tasks, optimizers and schedules by name: found, imported, and their arguments checked."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from hpctrain.config.locating import is_reference
from hpctrain.config.messages import Mistake, config_error, did_you_mean, printable
from hpctrain.config.overrides import apply_overrides
from hpctrain.config.schema import ComponentSection, Config
from hpctrain.config.source import read
from hpctrain.errors import ConfigError

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
        "classification": "hpctrain.training.task:Classification",
        "language_modeling": "hpctrain.training.language_modeling:LanguageModeling",
        "regression": "hpctrain.training.task:Regression",
    },
    "optimizer": {
        "adafactor": "torch.optim:Adafactor",
        "adagrad": "torch.optim:Adagrad",
        "adam": "torch.optim:Adam",
        "adamw": "torch.optim:AdamW",
        "nadam": "torch.optim:NAdam",
        "radam": "torch.optim:RAdam",
        "rmsprop": "torch.optim:RMSprop",
        "sgd": "torch.optim:SGD",
    },
    "scheduler": {
        "chained": "hpctrain.training.chained:Chained",
        "constant": "hpctrain.training.schedules:constant",
        "cosine": "hpctrain.training.schedules:cosine",
        "inverse_square_root": "hpctrain.training.schedules:inverse_square_root",
        "linear": "hpctrain.training.schedules:linear",
        "multistep": "hpctrain.training.schedules:multistep",
        "one_cycle": "hpctrain.training.schedules:one_cycle",
        "plateau": "hpctrain.training.plateau:Plateau",
        "step": "hpctrain.training.schedules:step_decay",
    },
}
"""Short names, by section. Strings, so that knowing them imports nothing."""


def unknown_name(section: str, use: str) -> str | None:
    """Return what is wrong with a `use` that is neither built in nor an import path."""
    known = BUILTINS[section]
    if use in known or is_reference(use):
        return None
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
) -> dict[str, Callable[..., Any]]:
    """Import every component and check its arguments.

    Args:
        config: whose `model`, `task`, `optimizer` and `scheduler` are wanted.
        given: by section and component, the arguments that hpctrain passes itself.
        path: the file that the config was loaded from; with it, mistakes have their lines.
        overrides: those that it was loaded with.

    Returns:
        By section, what to call with the section's arguments and those given.

    Raises:
        ConfigError: with every mistake in all of them.
    """
    targets: dict[str, Callable[..., Any]] = {}
    mistakes: list[Mistake] = []
    for section in BUILTINS:
        component = getattr(config, section)
        try:
            targets[section] = _imported(_reference(section, component))
        except ConfigError as error:
            mistakes.append(_mistake(section, component, str(error)))
        else:
            passed = given(section, targets[section])
            mistakes += bind(section, component, targets[section], given=passed)
    if mistakes and path is not None:
        source = read(path)
        apply_overrides(source, overrides)
        mistakes = [source.place(mistake) for mistake in mistakes]
    if mistakes:
        raise config_error(path or "config", mistakes)
    return targets


def resolve(section: str, component: ComponentSection) -> Callable[..., Any]:
    """Import what `use` names.

    Raises:
        ConfigError: if the module is not there, or fails to import, or has no such name.
    """
    try:
        return _imported(_reference(section, component))
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


def _imported(reference: str) -> Callable[..., Any]:
    """Return the object at "package.module:Name".

    Raises:
        ConfigError: with what is wrong, and no more: where it stands is for the caller to say.
    """
    module_name, _, name = reference.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)  # as `python -m` does, also from an installed script
    try:
        found: Any = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # whatever the user's module raises
        raise ConfigError(_why_not_imported(module_name, error)) from error
    for part in name.split("."):
        if not hasattr(found, part):
            raise ConfigError(f"module {module_name!r} has no {name!r}{_near(part, found)}")
        found = getattr(found, part)
    if not callable(found):
        raise ConfigError(f"is {type(found).__name__}, which cannot be called")
    return found  # type: ignore[no-any-return]


def _near(name: str, holder: Any) -> str:
    return did_you_mean(name, [item for item in dir(holder) if not item.startswith("_")])


def _why_not_imported(module_name: str, error: BaseException) -> str:
    """Tell a module that is not there from one that fails, and say where it fails."""
    absent = error.name if isinstance(error, ModuleNotFoundError) else None
    if absent is not None and f"{module_name}.".startswith(f"{absent}."):
        return f"the current directory and Python have no module {absent!r}"
    import traceback

    frames = traceback.extract_tb(error.__traceback__)
    # The import system's own frames, first and last, are nobody's mistake.
    own = [frame for frame in frames if not frame.filename.startswith("<frozen")]
    file, line = (own[-1].filename, own[-1].lineno) if own else (None, None)
    if isinstance(error, SyntaxError):
        file, line = error.filename, error.lineno
    where = f" ({file}, line {line})" if file is not None and file != importlib.__file__ else ""
    what = error.msg if isinstance(error, SyntaxError) else error
    reason = f"{type(error).__name__}: {what}"
    return printable(f"module {module_name!r} is there, but fails to import: {reason}{where}")
