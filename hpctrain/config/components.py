"""Models, tasks, optimizers and schedules by name: found, imported, and their arguments checked."""

from __future__ import annotations

import importlib
import inspect
import sys
import traceback
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from hpctrain.config.locating import is_reference
from hpctrain.config.messages import Mistake, did_you_mean, shown
from hpctrain.config.schema import ComponentSection

BUILTINS: Mapping[str, Mapping[str, str]] = {
    "model": {
        "convnet": "hpctrain.models.convnet:ConvNet",
        "mlp": "hpctrain.models.mlp:MLP",
    },
    "task": {
        "classification": "hpctrain.training.task:Classification",
        "regression": "hpctrain.training.task:Regression",
    },
    "optimizer": {
        "adam": "torch.optim:Adam",
        "adamw": "torch.optim:AdamW",
        "sgd": "torch.optim:SGD",
    },
    "scheduler": {
        "constant": "hpctrain.training.schedules:constant",
        "cosine": "hpctrain.training.schedules:cosine",
        "linear": "hpctrain.training.schedules:linear",
    },
}
"""Short names, by section. Strings, so that knowing them imports nothing."""


def unknown_name(section: str, use: str) -> str | None:
    """Return what is wrong with a `use` that is neither built in nor an import path."""
    known = BUILTINS[section]
    if use in known or is_reference(use):
        return None
    names = ", ".join(f'"{name}"' for name in known)
    return f'expected {names}, or "package.module:Name"{did_you_mean(use, known)}'


def resolve(section: str, component: ComponentSection) -> tuple[Callable[..., Any] | None, str]:
    """Import what `use` names.

    Returns:
        The object and "", or None and what is wrong.
    """
    reference = BUILTINS[section].get(component.use, component.use)
    module_name, _, name = reference.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # as `python -m` does, also from an installed script
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as error:  # noqa: BLE001 - whatever the user's module raises
        place = traceback.extract_tb(error.__traceback__)[-1]
        return None, (
            f"importing {module_name!r} failed: {type(error).__name__}: {error} "
            f"({place.filename}, line {place.lineno})"
        )
    for part in name.split("."):
        if not hasattr(found, part):
            return None, f"module {module_name!r} has no {name!r}{did_you_mean(part, dir(found))}"
        found = getattr(found, part)
    if not callable(found):
        return None, f"{reference} is {type(found).__name__}, which cannot be called"
    return found, ""


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
    try:
        parameters = inspect.signature(target).parameters
    except (TypeError, ValueError):  # written in C without a signature: the call will tell
        return []
    open_ended = any(item.kind is item.VAR_KEYWORD for item in parameters.values())
    named = {
        name: item
        for name, item in parameters.items()
        if item.kind in (item.POSITIONAL_OR_KEYWORD, item.KEYWORD_ONLY)
    }
    mistakes = []
    for name, value in component.arguments.items():
        key, text = f"{section}.{name}", f" = {shown(value)}: "
        if name in given:
            mistakes.append(Mistake(key=key, text=f"{text}hpctrain sets this itself"))
        elif name not in named and not open_ended:
            fields = [*(set(named) - set(given)), *type(component).__dataclass_fields__]
            near = did_you_mean(name, fields)
            text = f"{text}{component.use} has no such argument{near}"
            mistakes.append(Mistake(key=key, text=text))
    mistakes += [
        Mistake(key=f"{section}.{name}", text=f": missing; {component.use} needs it")
        for name, item in named.items()
        if item.default is item.empty and name not in given and name not in component.arguments
    ]
    return mistakes
