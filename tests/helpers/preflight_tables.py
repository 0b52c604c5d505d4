"""Ranks and worlds to judge."""

from __future__ import annotations

from typing import Any

from hpctrain.preflight.rank_facts import RankFacts
from hpctrain.topology import Topology

GIB = 2**30
VERSIONS = {"hpctrain": "0.1.0", "torch": "2.6", "h5py": "3.10"}


def rank(number: int = 0, **changed: Any) -> RankFacts:
    facts: dict[str, Any] = {
        "rank": number,
        "host": "n0",
        "node_rank": 0,
        "local_rank": number,
        "device": "cpu",
        "device_name": "",
        "device_uuid": "",
        "cores": tuple(range(8)),
        "node_cores": 8,
        "numa_nodes": (0,),
        "threads": 1,
        "interface": "lo",
        "addresses": ("127.0.0.1",),
        "link_speeds": {"lo": 0},
        "versions": VERSIONS,
        "open_files": (65536, 65536),
        "shm_bytes": (8 * GIB, 8 * GIB),
        "gpu_aware": {"MPICH_GPU_SUPPORT_ENABLED": "0"},
        "peers": (),
        "visible_devices": 0,
    }
    return RankFacts(**facts | changed)


def topology(**changed: Any) -> Topology:
    facts: dict[str, Any] = {
        "rank": 0,
        "world_size": 4,
        "local_rank": 0,
        "local_world_size": 2,
        "node_rank": 0,
        "num_nodes": 2,
        "hosts": ("n0", "n1"),
        "launcher": "srun",
        "mpi": "MPICH 4.2",
        "reasons": {"rank": "SLURM_PROCID=0"},
    }
    return Topology(**facts | changed)


def gpu(number: int, node: int = 0, **changed: Any) -> RankFacts:
    facts = {"device": f"cuda:{number}", "device_name": "H100", "visible_devices": 2}
    return rank(number, node_rank=node, host=f"n{node}", **facts | {"peers": (True,)} | changed)
