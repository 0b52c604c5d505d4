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

from hpctrain.config.messages import did_you_mean, printable

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
    parts = module.split(".")
    spec, folders = _find(parts[0], None), _folders()
    for depth, part in enumerate(parts, start=1):
        found = ".".join(parts[: depth - 1])
        if depth > 1:
            assert spec is not None
            if spec.submodule_search_locations is None:
                if _names(spec) is None:  # as `os` has `os.path`, and extension modules may
                    return None
                return f"{found!r} is a module, not a package with modules in it"
            folders = list(spec.submodule_search_locations)
            spec = _find(part, folders)
        if spec is None:
            where = f"package {found!r} has" if found else "the current directory and Python have"
            near = did_you_mean(part, _modules(folders), prefix=f"{found}." if found else "")
            return f"{where} no module {part!r}{near}"
    assert spec is not None
    try:
        names = _names(spec)
    except SyntaxError as error:
        file = printable(str(spec.origin))
        return f"{file}, line {error.lineno}: {printable(error.msg)}"
    first = name.split(".")[0]
    if names is not None and first not in names:
        return f"module {module!r} has no {first!r}{did_you_mean(first, names)}"
    return None


def _folders() -> list[str]:
    """Return where the top-level modules are: as after `python -m`, here first."""
    here = str(Path.cwd())
    return [here, *(folder for folder in sys.path if folder not in ("", here))]


def _find(name: str, folders: Sequence[str] | None) -> ModuleSpec | None:
    """Return the spec of the module with this last name, as the import system would choose it.

    For a top-level module (`folders` is None) all finders are asked, since an editable installation
    brings its own. None of them runs a module.
    """
    if folders is not None:
        # By its last name alone: with its full one, the package around it would have to be loaded.
        return PathFinder.find_spec(name, folders)
    for finder in sys.meta_path:
        path = _folders() if finder is PathFinder else None
        spec = finder.find_spec(name, path)
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
            tree = ast.parse(Path(spec.origin).read_bytes())
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
