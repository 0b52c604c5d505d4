"""From exec to a ready process group: hpctrain against a bare script, and at growing sizes.

    python benchmarks/startup.py              four ranks, in turns with the bare script
    python benchmarks/startup.py --scale 64   also up to 64 ranks, each on a node of its own

The bare script does what any must: import MPI and torch, broadcast an address, init_process_group.
Nodes are namespaces with their own host name, which needs root; without it all ranks share one.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

BARE = """
import socket, time
from mpi4py import MPI
import torch
from torch import distributed as dist
ranks = MPI.COMM_WORLD
with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    port = ranks.bcast(probe.getsockname()[1])
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=ranks.rank,
                        world_size=ranks.size)
dist.barrier()
if ranks.rank == 0:
    print("ready", time.time(), flush=True)
ranks.barrier()
dist.destroy_process_group()
"""

OURS = """
import time
import hpctrain
with hpctrain.connect() as world:
    from torch import distributed as dist
    dist.barrier()
    if world.topology.is_rank_zero:
        print("ready", time.time(), flush=True)
"""

# Seconds of the parts, and how many connections rank 0 and its watchdog have in the end.
PARTS = """
import time
from hpctrain.config.schema import LaunchSection
from hpctrain.launch.failure import guard
from hpctrain.launch.process_group import control_plane, gathering, process_group
began = time.time()
section = LaunchSection(device="cpu")
with control_plane() as (topology, communicator), guard(topology) as job_guard:
    communicator.barrier()
    discovered = time.time()
    with gathering(topology, communicator, section, job_guard) as meeting:
        communicator.barrier()
        gathered = time.time()
        import torch.distributed
        communicator.barrier()
        imported = time.time()
        with process_group(topology, communicator, section, meeting, job_guard):
            communicator.barrier()
            ready = time.time()
            if topology.is_rank_zero:
                import psutil
                own = psutil.Process()
                count = sum(len(each.net_connections("tcp"))
                            for each in [own, *own.children()])
                print("parts", topology.num_nodes, discovered - began, gathered - discovered,
                      ready - imported, count, flush=True)
"""


def start(ranks: int, script: str, *, nodes: bool = False) -> list[str]:
    """Run a script on ranks and return the words of the line that it prints."""
    command = [sys.executable, "-c", script]
    if nodes:
        # $0 and so on are the command; every rank names its own node.
        inner = 'hostname "node$PMI_RANK"; exec "$0" "$@"'
        command = ["unshare", "--uts", "bash", "-c", inner, *command]
    result = subprocess.run(
        ["mpirun", "-np", str(ranks), *command],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    return result.stdout.split()


def seconds_to_ready(ranks: int, script: str) -> float:
    began = time.time()
    return float(start(ranks, script)[1]) - began


def compare(ranks: int, repeats: int) -> None:
    bare, ours = [], []
    for _ in range(repeats):  # in turns: the machine's other work then falls on both
        bare.append(seconds_to_ready(ranks, BARE))
        ours.append(seconds_to_ready(ranks, OURS))
    print(f"{ranks} ranks, {repeats} starts each     median      best")
    for name, times in (("bare script", bare), ("hpctrain.connect", ours)):
        print(f"{name:<26}{statistics.median(times):>9.2f} s{min(times):>9.2f} s")
    ratio = statistics.median(ours) / statistics.median(bare)
    print(f"{'ratio':<26}{ratio:>9.2f}  {min(ours) / min(bare):>9.2f}")


def scale(most: int) -> None:
    nodes = os.geteuid() == 0 and shutil.which("unshare") is not None
    print("\nranks  nodes  discovery  meeting + watchdogs  process group  connections of rank 0")
    ranks = 4
    while ranks <= most:
        _, num_nodes, discovery, meeting, group, connections = start(ranks, PARTS, nodes=nodes)
        print(
            f"{ranks:>5}{num_nodes:>7}{float(discovery):>9.2f} s{float(meeting):>19.2f} s"
            f"{float(group):>13.2f} s{connections:>23}",
            flush=True,
        )
        ranks *= 4


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--scale", type=int, default=0, metavar="RANKS")
    arguments = parser.parse_args()
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    compare(arguments.ranks, arguments.repeats)
    if arguments.scale:
        scale(arguments.scale)


if __name__ == "__main__":
    main()
