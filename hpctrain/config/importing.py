"""Importing what a config names by "package.module:Name", and saying why that fails."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any

from hpctrain.config.code_folder import code_folder
from hpctrain.errors import ConfigError
from hpctrain.utils.text import did_you_mean, printable


def imported(reference: str) -> Callable[..., Any]:
    """Return the object at "package.module:Name".

    Raises:
        ConfigError: with what is wrong, and no more: where it stands is for the caller to say.
    """
    module_name, _, name = reference.partition(":")
    here = str(code_folder())
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
