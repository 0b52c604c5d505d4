"""`run SCRIPT`: a program of the user's own as ranks, here or where they are already."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from hpctrain.cli.processes import OPTIONS, check_world, num_processes, read_wanted, start
from hpctrain.cli.usage import HELP, PROGRAM, say, usage_error, usage_of
from hpctrain.errors import ExitCode
from hpctrain.launch.environment import Claim
from hpctrain.launch.program import Program, check_program, run_alone, run_as_ranks
from hpctrain.utils.text import did_you_mean


def run_script(arguments: Sequence[str], claim: Claim) -> int:
    """Run a script as ranks: start them, or be one of them. Collective in the latter case."""
    if arguments[:1] in (["-h"], ["--help"]):
        return say(claim, HELP)
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
