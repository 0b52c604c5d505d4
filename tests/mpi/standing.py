"""Run on every rank: after some steps one of them stands still in the way that is named."""

from __future__ import annotations

import os
import re
import signal
import sys
import time

import torch
from torch import distributed as dist

import hpctrain
from hpctrain.config.schema import LaunchSection

# Beyond every limit of the tests: others are to end the job.
FOREVER_SECONDS = 3600


def stand_still(how: str) -> None:
    if how == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    if how == "asleep":
        time.sleep(FOREVER_SECONDS)
    if how == "gil":
        re.match("(a+)+$", 40 * "a" + "b")  # for hours, and without letting the GIL go
    if how == "deadlock":
        dist.barrier(group=dist.new_group([0]))
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
    if how == "exit":
        os._exit(3)


def main() -> None:
    standing, how, limit = int(sys.argv[1]), sys.argv[2], float(sys.argv[3])
    section = LaunchSection(hang_timeout_seconds=limit)
    with hpctrain.connect(section) as world:
        for step in range(1, 6):
            if step == 4 and world.topology.rank == standing:
                print("in step 4", flush=True)
                stand_still(how)
            dist.all_reduce(torch.ones(4))
            world.pulse.step_done(step)


if __name__ == "__main__":
    main()
