"""Whether an import path leads anywhere, found out without importing it.

Importing a user's model would import torch and take seconds, and could run anything. So modules are
located as the import system would, and the name is looked up in the source of the module.
"""

from __future__ import annotations

import ast
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path

from hpctrain.config.code_folder import code_folder
from hpctrain.utils.text import did_you_mean, printable

_REFERENCE = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")

_MAKES_NAMES = {"exec", "globals", "locals", "modules", "setattr", "vars"}
"""Ways to define a name that the source does not show as a definition."""


def is_reference(text: str) -> bool:
    """Tell whether a text has the form "package.module:Name"."""
    return _REFERENCE.fullmatch(text) is not None


def problem_of(reference: str) -> str | None:
    """Return what is wrong with "package.module:Name", None if it can be found or may be there.

    Undecided is accepted: extension modules, star imports and modules with `__getattr__` do not
    show their names.
    """
    module, _, name = reference.partition(":")
    try:
        spec = _locate(module)
        names = None if spec is None else _names(spec)
    except LookupError as error:
        return str(error.args[0])
    except SyntaxError as error:
        return printable(f"{error.filename}, line {error.lineno}: {error.msg}")
    first = name.split(".")[0]
    if names is None or first in names:
        return None
    return f"module {module!r} has no {first!r}{did_you_mean(first, names)}"


def _locate(module: str) -> ModuleSpec | None:
    """Return the spec of "package.module"; None if there may be such a module.

    Raises:
        LookupError: with the reason, if there is none.
        SyntaxError: if what should have it is no Python.
    """
    first, *rest = module.split(".")
    folders = _folders()
    spec = _find_top_level(first)
    if spec is None:
        near = did_you_mean(first, _modules(folders))
        raise LookupError(f"the current directory and Python have no module {first!r}{near}")
    found = first
    for part in rest:
        if spec.submodule_search_locations is None:
            if _names(spec) is None:  # as `os` has `os.path`, and extension modules may
                return None
            raise LookupError(f"{found!r} is a module, not a package with modules in it")
        folders = list(spec.submodule_search_locations)
        # By its last name alone: with its full one, the package around it would have to be loaded.
        spec = PathFinder.find_spec(part, folders)
        if spec is None:
            near = did_you_mean(part, _modules(folders), prefix=f"{found}.")
            raise LookupError(f"package {found!r} has no module {part!r}{near}")
        found += f".{part}"
    return spec


def _folders() -> list[str]:
    """Return where the top-level modules are: as after `python -m`, here first."""
    here = str(code_folder())
    return [here, *(folder for folder in sys.path if folder not in ("", here))]


def _find_top_level(name: str) -> ModuleSpec | None:
    """Return the spec of a top-level module, as the import system would choose it.

    All finders are asked, since an editable installation brings its own; none of them runs it.
    """
    for finder in sys.meta_path:
        spec = finder.find_spec(name, _folders() if finder is PathFinder else None)
        if spec is not None:
            return spec
    return None


def _modules(folders: Sequence[str]) -> set[str]:
    """Return the modules that lie in folders."""
    names: set[str] = set()
    for folder in folders:
        try:
            items = list(Path(folder).iterdir())
        except OSError:
            continue
        names |= {item.stem for item in items if item.suffix == ".py"}
        names |= {item.name for item in items if (item / "__init__.py").is_file()}
    return names


def _names(spec: ModuleSpec) -> set[str] | None:
    """Return the names that a module defines at its top level; None if its source cannot tell.

    Raises:
        SyntaxError: if the source is none.
    """
    if spec.origin is None and spec.submodule_search_locations is not None:
        return set()  # a folder without __init__.py holds modules and nothing else
    if spec.origin is None or not isinstance(spec.loader, SourceFileLoader):
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # such as an odd escape in a string: not our business
            tree = ast.parse(Path(spec.origin).read_bytes(), spec.origin)
    except (OSError, ValueError, RecursionError, MemoryError):
        return None  # the import itself will tell
    for node in ast.walk(tree):
        word = node.id if isinstance(node, ast.Name) else getattr(node, "attr", None)
        if word in _MAKES_NAMES:
            return None
    names = set(_defined(tree.body))
    names |= {
        name for node in ast.walk(tree) if isinstance(node, ast.Global) for name in node.names
    }
    return None if names & {"*", "__getattr__"} else names


def _defined(body: Sequence[ast.AST]) -> Iterator[str]:
    """Yield the names that statements of a module's top level may define."""
    for statement in body:
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield statement.name
        elif isinstance(statement, ast.Import | ast.ImportFrom):
            for alias in statement.names:
                yield alias.asname or alias.name.split(".")[0]
        elif isinstance(statement, ast.Name):
            if isinstance(statement.ctx, ast.Store):
                yield statement.id
        else:
            # Assignments in any form, and what stands below `if`, `try`, `with`, `for`, `match`.
            yield from _defined(list(ast.iter_child_nodes(statement)))
