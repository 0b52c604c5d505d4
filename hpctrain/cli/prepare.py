"""`prepare CONFIG|SCRIPT`: fetch the data on a node with internet, in one process."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from hpctrain.cli.usage import Parser, usage_error, usage_of
from hpctrain.config.choices import PREPARING
from hpctrain.errors import ExitCode, HpctrainError
from hpctrain.launch.program import Program, check_program, run_program, show_failure
from hpctrain.utils.streams import write_out

_HIDES_GPUS = {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}


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
