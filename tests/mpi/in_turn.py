"""Run on every rank: command lines one after the other, in one world.

Arguments: command lines as JSON lists, of hpctrain, of a body of this folder, such as "step.py", or
of another program. Each is all that it is by itself but for the start of its ranks: what they say
goes to files of its own. Of each the exit code is printed.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))

from helpers.turns import ENDED, as_if_started, outputs_of

from hpctrain.cli import main as hpctrain
from hpctrain.launch import process_group
from hpctrain.topology import Communicator, Topology


@contextmanager
def told_to(paths: Sequence[Path]) -> Iterator[None]:
    """Have what this process prints on stdout and on stderr be appended to files."""
    streams = [os.dup(number) for number in (1, 2)]
    try:
        for number, path in zip((1, 2), paths, strict=True):
            file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
            os.dup2(file, number)
            os.close(file)
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, stream in zip((1, 2), streams, strict=True):
            os.dup2(stream, number)
            os.close(stream)


def standing(topology: Topology, communicator: Communicator) -> Any:
    """Return what stands in for the making of a world: this one, however often."""

    @contextmanager
    def control_plane(*_: Any, **__: Any) -> Iterator[tuple[Topology, Communicator]]:
        yield topology, communicator

    return control_plane


def run(line: Sequence[str]) -> int:
    """Run a command line to its end and return the exit code."""
    if not line[0].endswith(".py"):
        return hpctrain(line)
    arguments, places = sys.argv, list(sys.path)
    sys.argv = list(line)
    program = Path(__file__).parent / line[0]
    sys.path.insert(0, str(program.parent))
    try:
        runpy.run_path(str(program), run_name="__main__")
    finally:
        sys.argv, sys.path[:] = arguments, places
    return 0


def main() -> None:
    lines = [json.loads(line) for line in sys.argv[1:]]
    site = Path.cwd()
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    with process_group.control_plane() as (topology, communicator):
        process_group.control_plane = standing(topology, communicator)
        for number, line in enumerate(lines):
            with as_if_started(site), told_to(outputs_of(site, number)):
                code = run(line)
            assert communicator.all_gather(code) == [code] * topology.world_size
            if topology.is_rank_zero:
                print(f"{ENDED}{code}", flush=True)


if __name__ == "__main__":
    main()
