"""`run SCRIPT`: a program of the user's own as ranks; `prepare`: one that fetches its data."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from hpctrain.cli.processes import OPTIONS, check_world, num_processes, read_wanted, start
from hpctrain.cli.usage import PROGRAM, Parser, usage_error, usage_of
from hpctrain.config.choices import PREPARING
from hpctrain.errors import ExitCode, HpctrainError
from hpctrain.launch.environment import Claim
from hpctrain.launch.program import (
    Program,
    check_program,
    run_alone,
    run_as_ranks,
    run_program,
    show_failure,
)
from hpctrain.utils.streams import write_out
from hpctrain.utils.text import did_you_mean

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
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*")
    parsed = parser.parse_intermixed_args(arguments)

    from hpctrain.config import load

    config = load(parsed.config, parsed.overrides)
    from hpctrain.training.fetch import fetch  # brings torch

    made = fetch(config, parsed.config, parsed.overrides)
    _tell(parsed.config, made)
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
    _tell(program.name, [])
    return ExitCode.DONE


def _tell(what: str, made: Sequence[str]) -> None:
    called = [f"prepare_data of {name}" for name in _prepared()]
    done = ", ".join([*made, *called]) or "no prepare_data was called"
    write_out(f"{what}: {done}\n")


def _prepared() -> Sequence[str]:
    from hpctrain.training.prepare_data import prepared

    return prepared
