"""Run on every rank: jobs that go on with runs of an older release, one after the other.

Arguments: a folder with the configs and run folders of `tests/data`, and names of cases. Of each
one line is printed: {"case", "code", "error"}.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from hpctrain.config import load
from hpctrain.errors import HpctrainError
from hpctrain.launch.failure import Guard, guard
from hpctrain.launch.process_group import control_plane, gathering
from hpctrain.topology import Communicator, Topology
from hpctrain.training.job import train


class NoSignals:
    value = 0


def go_on(name: str, topology: Topology, communicator: Communicator, job_guard: Guard) -> int:
    config = load(f"{name}.toml")
    signals: Any = NoSignals()
    with gathering(topology, communicator, config.launch, job_guard) as meeting:
        return train(
            config,
            topology,
            communicator,
            meeting=meeting,
            signals=signals,
            guard=job_guard,
            command=[f"{name}.toml"],
        )


def main() -> None:
    folder, *cases = sys.argv[1:]
    os.chdir(folder)
    with control_plane() as (topology, communicator), guard(topology) as job_guard:
        for case in cases:
            message = None
            try:
                code = go_on(case, topology, communicator, job_guard)
            except HpctrainError as error:
                if not error.everywhere:
                    raise
                code, message = int(error.exit_code), str(error)
            if topology.is_rank_zero:
                found = {"case": case, "code": int(code), "error": message}
                print("case", json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
