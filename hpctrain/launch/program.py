"""A user's program, run in this process as `python PROGRAM` would run it.

It is `__main__`: its arguments are `sys.argv`, its folder is the first of `sys.path`, data workers
that start Python anew find it by its file, and a traceback begins with its own first line.
"""

from __future__ import annotations

import builtins
import importlib.util
import io
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType, TracebackType

from hpctrain.errors import HpctrainError, UsageError
from hpctrain.launch.environment import Claim
from hpctrain.topology import Topology
from hpctrain.utils.text import did_you_mean, printable

_HERE = Path(__file__).parents[1]
_FAILED = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """A script or a module, and what it is given.

    Attributes:
        name: file of the script, or name of the module.
        is_module: as after `python -m`.
    """

    name: str
    arguments: Sequence[str] = ()
    is_module: bool = False

    @property
    def words(self) -> list[str]:
        """What stands after `python`."""
        return [*(["-m"] if self.is_module else []), self.name, *self.arguments]

    @property
    def path(self) -> Path:
        """File of a script; of a folder that Python can run, of its `__main__.py`."""
        path = Path(self.name)
        return path / "__main__.py" if path.is_dir() else path


def check_program(program: Program) -> None:
    """Check that there is such a script, before anything is started for it.

    Raises:
        UsageError: if there is none.
    """
    path = program.path
    if program.is_module or path.is_file():
        return
    others = [str(other) for other in path.parent.glob("*.py")] if path.parent.is_dir() else []
    near = did_you_mean(str(path), others)
    raise UsageError(printable(f"{path}: no such file{near}"), everywhere=True)


def run_program(program: Program) -> None:
    """Run a program to its end; what it raises is raised.

    Raises:
        UsageError: if it is not there.
    """
    main, code = _module(program) if program.is_module else _script(program)
    sys.argv[:] = [str(main.__file__), *program.arguments]
    # It stays: threads of the program, and what unpickles its classes, look there to the end.
    sys.modules["__main__"] = main
    exec(code, main.__dict__)


def run_alone(program: Program) -> int:
    """Run a program in one process, and return its exit code as Python would have it.

    `sys.exit`, an interrupt and what hpctrain explains itself are raised.
    """
    try:
        run_program(program)
    except HpctrainError:
        raise
    except Exception as error:  # noqa: BLE001 - as at the top of a program
        return show_failure(error)
    return 0


def show_failure(error: Exception) -> int:
    """Print what a program has raised as Python does, and return the exit code."""
    shown = error.with_traceback(_of_program(error.__traceback__))
    sys.excepthook(type(shown), shown, shown.__traceback__)
    return _FAILED


def run_as_ranks(program: Program, claim: Claim, check: Callable[[Topology], None]) -> None:
    """Run a program on every rank of a launcher; the end of one of them is that of the job.

    Collective: all ranks.

    Args:
        program: the same on all ranks.
        claim: what the launcher says of this process.
        check: raises a LaunchError of all ranks if the world is not the one that was asked for.

    Raises:
        HpctrainError: that all ranks share.
    """
    from hpctrain.launch.process_group import standing_ranks

    ending: SystemExit | None = None
    with standing_ranks(claim) as ranks:
        check(ranks.topology)
        try:
            run_program(program)
        except SystemExit as asked:
            is_shared = getattr(asked, "everywhere", False)
            if asked.code not in (0, None) and not is_shared:
                ranks.guard.end_job(asked, None)
            ending = asked
    if ending is not None:
        raise ending


def _script(program: Program) -> tuple[ModuleType, CodeType]:
    check_program(program)
    path = program.path
    with io.open_code(str(path.absolute())) as file:
        source = file.read()
    main = _new_main(str(path))
    main.__loader__ = SourceFileLoader("__main__", str(path))
    # As Python has it: the folder of the file that a link leads to.
    _put_first(path.parent.absolute() if Path(program.name).is_dir() else path.resolve().parent)
    return main, compile(source, str(path), "exec", dont_inherit=True)


def _module(program: Program) -> tuple[ModuleType, CodeType]:
    _put_first(Path.cwd())
    spec = _spec(program.name)
    if spec is not None and spec.submodule_search_locations is not None:
        spec = _spec(f"{program.name}.__main__")
    get_code = getattr(getattr(spec, "loader", None), "get_code", None)
    code = None if spec is None or get_code is None else get_code(spec.name)
    if spec is None or code is None:
        raise UsageError(f"-m {program.name}: there is no such module to run", everywhere=True)
    main = _new_main(str(spec.origin))
    main.__spec__, main.__loader__, main.__package__ = spec, spec.loader, spec.parent
    return main, code


def _spec(name: str) -> ModuleSpec | None:
    try:
        return importlib.util.find_spec(name)
    except ModuleNotFoundError:  # of a package above it
        return None


def _new_main(file: str) -> ModuleType:
    main = ModuleType("__main__")
    main.__file__ = file
    main.__dict__.update(__builtins__=builtins, __annotations__={})
    return main


def _put_first(folder: Path) -> None:
    """Have modules be looked for in a folder first, in place of where `python -m` looks."""
    if not getattr(sys.flags, "safe_path", False):
        sys.path[0] = str(folder)


def _of_program(trace: TracebackType | None) -> TracebackType | None:
    """Return a traceback from the program's own first line on."""
    first = trace
    while first is not None and Path(first.tb_frame.f_code.co_filename).is_relative_to(_HERE):
        first = first.tb_next
    return first
