"""Whether an import path leads anywhere, found out without importing it.

Importing a user's model would import torch and take seconds, and could run anything. So modules are
located as the import system would, and the name is looked up in the source of the module.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

from hpctrain.config.messages import did_you_mean

_REFERENCE = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")


def is_reference(text: str) -> bool:
    """Tell whether a text has the form "package.module:Name"."""
    return _REFERENCE.fullmatch(text) is not None


def problem(reference: str) -> str | None:
    """Return what is wrong with "package.module:Name", None if it can be found or may be there.

    Undecided is accepted: extension modules, star imports and modules with `__getattr__` do not
    show their names.
    """
    module, _, name = reference.partition(":")
    spec = None
    path: Sequence[str] | None = None
    parts = module.split(".")
    for depth, part in enumerate(parts, start=1):
        spec = _find(".".join(parts[:depth]), path)
        if spec is None:
            missing = ".".join(parts[:depth])
            near = did_you_mean(part, _siblings(path))
            return f"no module {missing!r} in the current directory or the environment{near}"
        path = spec.submodule_search_locations
        if path is None and depth < len(parts):
            return f"{'.'.join(parts[:depth])!r} is a module, not a package with modules in it"
    assert spec is not None
    names = _names(spec)
    first = name.split(".")[0]
    if names is not None and first not in names:
        return f"module {module!r} has no {first!r}{did_you_mean(first, names)}"
    return None


def _find(fullname: str, path: Sequence[str] | None) -> ModuleSpec | None:
    if path is not None:
        return PathFinder.find_spec(fullname, path)
    here = PathFinder.find_spec(fullname, [str(Path.cwd())])
    if here is not None:
        return here
    # All finders, since an editable installation brings its own; none of them runs a module.
    for finder in sys.meta_path:
        spec = finder.find_spec(fullname, None)
        if spec is not None:
            return spec
    return None


def _siblings(path: Sequence[str] | None) -> list[str]:
    """Return the modules that stand where one was not found."""
    names: list[str] = []
    for folder in [str(Path.cwd())] if path is None else path:
        try:
            items = list(Path(folder).iterdir())
        except OSError:
            continue
        names += [item.stem for item in items if item.suffix == ".py" or item.is_dir()]
    return names


def _names(spec: ModuleSpec) -> set[str] | None:
    """Return the names that a module defines at its top level; None if its source cannot tell."""
    if spec.origin is None or not spec.origin.endswith(".py"):
        return None
    try:
        tree = ast.parse(Path(spec.origin).read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError):
        return None  # the import itself will tell, better
    names = set(_defined(tree.body))
    return None if names & {"*", "__getattr__"} else names


def _defined(body: Sequence[ast.stmt]) -> Iterator[str]:
    for statement in body:
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield statement.name
        elif isinstance(statement, ast.Import | ast.ImportFrom):
            for alias in statement.names:
                yield alias.asname or alias.name.split(".")[0]
        else:
            # Assignments in any form, and what stands below `if`, `try`, `with`, `for`.
            for node in ast.walk(statement):
                if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                    yield node.id
            for field in ("body", "orelse", "finalbody"):
                yield from _defined(getattr(statement, field, []))
            for handler in getattr(statement, "handlers", []):
                yield from _defined(handler.body)
