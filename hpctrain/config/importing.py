"""Import paths "package.module:Name": where they are looked for, found and imported.

The user's own modules are in the current directory, or in a snapshot of it: a job that waits for a
day in a queue is to run the code that it was submitted with. So `job --snapshot` copies the
project, and the job's script names the copy: modules come from there, while data and run folders
stay relative to the directory that the job runs in.

A config is checked without importing: a model would import torch and take seconds, and could run
anything. So modules are located as the import system would, and the name is looked up in the source
of the module.
"""

from __future__ import annotations

import ast
import functools
import importlib
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from typing import Any

from hpctrain.errors import ConfigError
from hpctrain.utils.json_files import SMALL, parse_json, read_whole
from hpctrain.utils.text import did_you_mean, printable

MARKER = ".hpctrain-snapshot.json"
"""Lies in the root of a snapshot, and says what it is one of."""

_VARIABLE = "HPCTRAIN_CODE"
"""Set by `use_snapshot`, for the processes that a rank starts."""

_REFERENCE = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")

_MAKES_NAMES = {"exec", "globals", "locals", "modules", "setattr", "vars"}
"""Ways to define a name that the source does not show as a definition."""


def code_folder() -> Path:
    """Return the folder whose modules come first."""
    return Path(os.environ.get(_VARIABLE) or Path.cwd())


def snapshot() -> tuple[Path, Path] | None:
    """Return the root of the snapshot in use and of the project it was taken of; None: of none."""
    folder = os.environ.get(_VARIABLE)
    if folder:
        for root in (Path(folder), *Path(folder).parents):
            if (root / MARKER).is_file():
                return root, _project_of(root)
    return None


def use_snapshot(root: Path) -> None:
    """Have modules of the project come from a snapshot, in this process and those it starts.

    Raises:
        ConfigError: if that is not a snapshot.
    """
    root = root.resolve()
    project, here = _project_of(root), Path.cwd().resolve()
    folder = root / here.relative_to(project) if here.is_relative_to(project) else root
    os.environ[_VARIABLE] = str(folder)
    kept = []
    for entry in sys.path:
        path = Path(entry or ".").resolve()
        if path == here:  # what `python -m` puts first
            continue
        # Where the project is installed from its folder, or on PYTHONPATH: the copy of that.
        copied = root / path.relative_to(project) if path.is_relative_to(project) else None
        kept.append(str(copied) if copied is not None and copied.is_dir() else entry)
    sys.path[:] = [str(folder), *kept]


def _project_of(root: Path) -> Path:
    try:
        return Path(parse_json(read_whole(root / MARKER, SMALL))["project"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"--code {root}: this is not a snapshot that `job --snapshot` has made: {error}"
        ) from error


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


def build_transform(key: str, reference: str, arguments: Mapping[str, Any]) -> Callable[..., Any]:
    """Return a function with its arguments bound, or an object of a class made with them.

    Args:
        key: of the config that names it, such as "data.transform".
        reference: "package.module:Name".
        arguments: by name.

    Raises:
        ConfigError: if it cannot be imported, or refuses its arguments.
    """
    target = imported(reference)
    if not isinstance(target, type):
        return functools.partial(target, **arguments)
    try:
        built: object = target(**arguments)
    except (TypeError, ValueError) as error:
        raise ConfigError(f'{key} = "{reference}" refuses its arguments: {error}') from error
    if not callable(built):
        raise ConfigError(
            f'{key} = "{reference}": its objects cannot be called; give the class a method __call__'
        )
    return built


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


_PLAIN_BASES = {"object", "Module", "nn.Module", "torch.nn.Module"}
"""Bases of a class that bring no method of a task."""


def has_method(reference: str, method: str) -> bool | None:
    """Tell whether a class defines or may inherit a method, without importing it.

    Returns:
        None where its source does not say: a function, a class with other bases, no source.
    """
    module, _, name = reference.partition(":")
    try:
        spec = _locate(module)
        tree = None if spec is None else _tree(spec)
    except (LookupError, SyntaxError):
        return None  # which `problem_of` reports
    body = [] if tree is None else tree.body
    found = [item for item in body if isinstance(item, ast.ClassDef) and item.name == name]
    if len(found) != 1:
        return None
    methods = {item.name for item in found[0].body if isinstance(item, ast.FunctionDef)}
    if method in methods:
        return True
    plain = not found[0].decorator_list and not found[0].keywords
    bases = {ast.unparse(base) for base in found[0].bases}
    return False if plain and bases <= _PLAIN_BASES else None


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
    tree = _tree(spec)
    if tree is None:
        return None
    for node in ast.walk(tree):
        word = node.id if isinstance(node, ast.Name) else getattr(node, "attr", None)
        if word in _MAKES_NAMES:
            return None
    names = set(_defined(tree.body))
    names |= {
        name for node in ast.walk(tree) if isinstance(node, ast.Global) for name in node.names
    }
    return None if names & {"*", "__getattr__"} else names


def _tree(spec: ModuleSpec) -> ast.Module | None:
    """Return the source of a module, parsed; None if it has none that can be read.

    Raises:
        SyntaxError: if it is not Python.
    """
    if spec.origin is None or not isinstance(spec.loader, SourceFileLoader):
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # such as an odd escape in a string: not our business
            return ast.parse(Path(spec.origin).read_bytes(), spec.origin)
    except (OSError, ValueError, RecursionError, MemoryError):
        return None  # the import itself will tell


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
