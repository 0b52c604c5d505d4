"""Ranks without MPI: torch's own elastic agent starts them, one agent a node.

It serves where several nodes have no launcher, as on clouds whose guides set MASTER_ADDR and
NODE_RANK on each, and on one node without an MPI. Its ranks are a world of torchrun.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

from hpctrain.errors import UsageError
from hpctrain.launch.environment import WHOLE_NUMBER
from hpctrain.utils.proc import allowed_cores

PORT = 29400
"""Where the agents meet if nothing else is said, as Fabric's do."""

_MOST_NODES = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Nodes:
    """One command a node: how many of them, which one this is, and where they meet."""

    count: int
    rank: int
    address: str
    port: int = PORT


def nodes_of(
    env: Mapping[str, str],
    *,
    count: int | None = None,
    rank: int | None = None,
    address: str | None = None,
    port: int | None = None,
) -> Nodes | None:
    """Return the nodes that a command line and the environment tell of; None: this one alone.

    What is given stands before NODE_RANK, WORLD_SIZE, which counts nodes only here, MASTER_ADDR and
    MASTER_PORT.

    Raises:
        UsageError: if something is missing, or does not fit.
    """
    if rank is None and count is None and ("NODE_RANK" not in env or "RANK" in env):
        return None
    sizes = [name for name in ("NNODES", "WORLD_SIZE") if name in env]
    if count is None:
        if not sizes:
            raise _missing("--num-nodes N", "WORLD_SIZE or NNODES, the number of nodes")
        count = _number(env, sizes[0])
    if count == 1:
        return None
    if rank is None:
        if "NODE_RANK" not in env:
            raise _missing("--node-rank R", "NODE_RANK, from 0 on")
        rank = _number(env, "NODE_RANK")
    if not 0 <= rank < count <= _MOST_NODES:
        raise UsageError(
            f"node rank {rank} of {count} nodes: node ranks are 0 to {count - 1}", everywhere=True
        )
    address = address or env.get("MASTER_ADDR")
    if not address:
        raise _missing("--main-address A", "MASTER_ADDR, the address of node 0")
    if port is None:
        port = _number(env, "MASTER_PORT") if env.get("MASTER_PORT") else PORT
    if not 0 < port < 65536:
        raise UsageError(f"port {port}: ports are 1 to 65535", everywhere=True)
    return Nodes(count=count, rank=rank, address=address, port=port)


def start_over_nodes(nodes: Nodes, num_processes: int, words: Sequence[str]) -> NoReturn:
    """Become this node's agent, which starts `num_processes` of `python WORDS` in one world."""
    _become(
        num_processes,
        [
            *(f"--nnodes={nodes.count}", f"--node-rank={nodes.rank}"),
            *(f"--master-addr={nodes.address}", f"--master-port={nodes.port}"),
        ],
        words,
    )


def start_on_this_node(num_processes: int, words: Sequence[str]) -> NoReturn:
    """Become an agent that starts `num_processes` of `python WORDS`, a world of their own."""
    _become(num_processes, ["--standalone"], words)


def command_here(num_processes: int, words: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Return the command of such an agent, and its environment."""
    return _command(num_processes, ["--standalone"], words)


def _become(num_processes: int, options: Sequence[str], words: Sequence[str]) -> NoReturn:
    command, environment = _command(num_processes, options, words)
    os.execve(command[0], command, environment)


def _command(
    num_processes: int, options: Sequence[str], words: Sequence[str]
) -> tuple[list[str], dict[str, str]]:
    command = [
        *(sys.executable, "-m", "torch.distributed.run", *options),
        *(f"--nproc-per-node={num_processes}", "--no-python", sys.executable, *words),
    ]
    environment = dict(os.environ)
    for variable in ("NODE_RANK", "WORLD_SIZE"):  # of nodes, which ranks would take for theirs
        environment.pop(variable, None)
    # The agent would set 1, and warn of it.
    cores = len(allowed_cores())
    environment.setdefault("OMP_NUM_THREADS", str(max(1, cores // num_processes)))
    return command, environment


def _number(env: Mapping[str, str], variable: str) -> int:
    text = env[variable]
    if not WHOLE_NUMBER.fullmatch(text):
        raise UsageError(f"{variable}={text!r} is not a whole number from 0", everywhere=True)
    return int(text)


def _missing(option: str, variable: str) -> UsageError:
    return UsageError(
        f"for several nodes {option} is needed, or in the environment {variable}", everywhere=True
    )
