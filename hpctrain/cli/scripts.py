"""`run SCRIPT`: a program of the user's own as ranks; `prepare`: one that fetches its data.

The program runs in this process as `python PROGRAM` would run it. It is `__main__`: its arguments
are `sys.argv`, its folder is the first of `sys.path`, data workers that start Python anew find it
by its file, and a traceback begins with its own first line.
"""

from __future__ import annotations

import builtins
import importlib.util
import io
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType, TracebackType

from hpctrain.cli.processes import OPTIONS, check_world, num_processes, read_wanted, start
from hpctrain.cli.usage import PROGRAM, Parser, usage_error, usage_of
from hpctrain.config.choices import PREPARING
from hpctrain.errors import ExitCode, HpctrainError, UsageError
from hpctrain.launch.environment import Claim
from hpctrain.topology import Topology
from hpctrain.utils.streams import write_out
from hpctrain.utils.text import did_you_mean, printable

_HIDES_GPUS = {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}


def run_script(arguments: Sequence[str], claim: Claim) -> int:
    """Run a script as ranks: start them, or be one of them. Collective in the latter case."""
    program, given = parse_run(arguments)
    if not program.is_module and Path(program.name).suffix == ".toml":
        words = " ".join([program.name, *program.arguments])
        raise usage_error(
            f"{program.name} is a config, not a script: {PROGRAM} {words}", usage_of("run")
        )
    is_by_hand = claim.launcher is None or "--node-rank" in given
    wanted = read_wanted(given, "run", os.environ if is_by_hand else {})
    check_program(program)
    if claim.launcher is not None and claim.world_size != 1 and wanted.nodes is None:
        os.environ.update(wanted.choices)
        run_as_ranks(program, claim, lambda topology: check_world(wanted, topology))
        return ExitCode.DONE
    count = num_processes(wanted, "run")
    if count > 1 or wanted.nodes is not None:
        start(wanted, count, ["run", *wanted.words, "--", *program.words], claim, without_mpi=True)
    os.environ.update(wanted.choices)
    return run_alone(program)


def parse_run(arguments: Sequence[str]) -> tuple[Program, dict[str, str]]:
    """Return the program, and our options before and after it; all else is the program's.

    Raises:
        UsageError: if there is no program, or something before it is not known.
    """
    given: dict[str, str] = {}
    name: str | None = None
    is_module = False
    own: list[str] = []
    is_for_us = True
    words = list(arguments)
    while words:
        word = words.pop(0)
        option, equals, value = word.partition("=")
        # As Fabric's command line has it: --num_nodes too.
        option = option.replace("_", "-") if option.startswith("--") else option
        if word == "--" and is_for_us:
            is_for_us = False
        elif is_for_us and option in OPTIONS:
            if not equals and not words:
                raise usage_error(f"{option} needs a value", usage_of("run"))
            given[option] = value if equals else words.pop(0)
        elif name is None and word == "-m":
            is_module, name = True, words.pop(0) if words else ""
        elif name is None and is_for_us and word.startswith("-"):
            near = did_you_mean(option, OPTIONS)
            raise usage_error(
                f"unrecognized arguments: {word}{near}; a script's own options follow the script",
                usage_of("run"),
            )
        elif name is None:
            name = word
        else:
            own.append(word)
    if not name:
        raise usage_error("a script is needed, or -m and a module", usage_of("run"))
    return Program(name=name, arguments=own, is_module=is_module), given


def prepare(arguments: list[str]) -> int:
    """Fetch what a config or a script needs from the internet; train nothing."""
    if not arguments or (arguments[0].startswith("-") and arguments[0] != "-m"):
        raise usage_error("a config or a script is needed", usage_of("prepare"))
    os.environ[PREPARING] = "1"
    # Login nodes that have some share them.
    os.environ.update(_HIDES_GPUS)
    if Path(arguments[0]).suffix == ".toml":
        return _prepare_config(arguments)
    is_module = arguments[0] == "-m"
    name, *own = arguments[is_module:] or [""]
    program = Program(name=name, arguments=own, is_module=is_module)
    check_program(program)
    return _prepare_script(program)


def _prepare_config(arguments: Sequence[str]) -> int:
    parser = Parser("prepare")
    parser.take_config()
    parsed = parser.parse_intermixed_args(arguments)

    from hpctrain.config import load

    config = load(parsed.config, parsed.overrides)
    from hpctrain.training.program import fetch  # brings torch

    made = fetch(config, parsed.config, parsed.overrides)
    _report(parsed.config, made)
    return ExitCode.DONE


def _prepare_script(program: Program) -> int:
    """Run a script until its Trainers have fetched their data; `connect()` ends it.

    What a script does after a `fit` that has trained nothing may well fail.
    """
    try:
        run_program(program)
    except HpctrainError:
        raise
    except SystemExit as asked:
        if asked.code not in (0, None):
            raise
    except Exception as error:  # noqa: BLE001 - whatever the script raises
        if not _prepared():
            return show_failure(error)
        what = type(error).__name__
        write_out(f"{program.name} ended by {what} after that: nothing was trained here\n")
    _report(program.name, [])
    return ExitCode.DONE


def _report(what: str, made: Sequence[str]) -> None:
    called = [f"prepare_data of {name}" for name in _prepared()]
    done = ", ".join([*made, *called]) or "no prepare_data was called"
    write_out(f"{what}: {done}\n")


def _prepared() -> Sequence[str]:
    from hpctrain.training.prepare_data import prepared

    return prepared


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
