"""Run on every rank: one of them fails in the way that the command line names."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

import hpctrain
from hpctrain.errors import DatasetError

# Beyond every limit of the tests: others are to end the job.
FOREVER_SECONDS = 3600


def fail(how: str) -> None:
    if how == "exception":
        raise ValueError("the story")
    if how == "exit":
        sys.exit(3)
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "dataset":
        raise DatasetError("a shard is gone")
    if how == "thread":
        thread = threading.Thread(target=fail, args=("exception",))
        thread.start()
        thread.join()


def main() -> None:
    failing, how = int(sys.argv[1]), sys.argv[2]
    with hpctrain.connect() as world:
        if world.topology.rank == failing:
            fail(how)
        # The others are where they can hear of it least: neither in MPI nor in a collective.
        time.sleep(FOREVER_SECONDS)


if __name__ == "__main__":
    main()
