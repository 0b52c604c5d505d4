"""The way that NCCL takes is read from its own log: pieces of logs that others have published."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpctrain.launch.nccl_log import (
    NcclLog,
    Transport,
    combine,
    describe,
    fast_cards,
    find_trouble,
    parse,
)
from hpctrain.preflight.network import judge_transport

# NVIDIA/nccl issues 226 (2.4), 1357 (IBext plug-in), 1189 and nccl-tests 185 (InfiniBand), 1267
# (one process), 1538 (2.22), 2057 (2.29); aws/aws-ofi-nccl issues 161 and 715; ROCm/rccl 1026.
OLD = """\
ip-172-31-0-11:45384:45384 [0] NCCL INFO NET/IB : No device found.
NCCL version 2.4.7+cuda9.2
ip-172-31-10-182:45407:45407 [0] NCCL INFO NET/Socket : Using [0]ens3:172.31.10.182<0>
ip-172-31-10-182:45407:45407 [0] NCCL INFO NET/Plugin : No plugin found (libnccl-net.so).
"""
INFINIBAND = """\
dgxh100-4:460770:460770 [0] NCCL INFO Bootstrap : Using enp220s0np0:11.1.128.136<0>
dgxh100-4:460770:460770 [0] NCCL INFO NET/Plugin : dlerror=libnccl-net.so: cannot open shared \
object file: No such file or directory No plugin found (libnccl-net.so), using internal \
implementation
dgxh100-4:460770:460770 [0] NCCL INFO cudaDriverVersion 12000
NCCL version 2.19.3+cuda12.3
dgxh100-4:460770:460842 [0] NCCL INFO NET/IB : Using [0]mlx5_10:1/RoCE [1]mlx5_11:1/RoCE [RO]; \
OOB enp220s0np0:11.1.128.136<0>
dgxh100-4:460770:460842 [0] NCCL INFO Using non-device net plugin version 0
dgxh100-4:460770:460842 [0] NCCL INFO Using network IB
H20-GPU-06:4015539:4015652 [0] NCCL INFO Channel 07/0 : 0[0] -> 2[0] [receive] via NET/IB/3/GDRDMA
H20-GPU-06:4015540:4015653 [1] NCCL INFO Channel 00/0 : 3[1] -> 2[0] via P2P/CUMEM
"""
EXTENDED = """\
qh100-gpu20:39629:39686 [0] NCCL INFO NET/Plugin: Failed to find ncclNetPlugin_v8 symbol.
qh100-gpu20:39629:39686 [0] NCCL INFO NET/Plugin: Loaded net plugin NCCL RDMA Plugin v6 (v6)
qh100-gpu20:39629:39686 [0] NCCL INFO NET/Plugin: Loaded collnet plugin SHARP (v6)
qh100-gpu20:39629:39686 [0] NCCL INFO P2P plugin IBext
qh100-gpu19:49357:49418 [3] NCCL INFO NET/IB : Using [0]mlx5_0:1/IB/SHARP [1]mlx5_1:1/IB/SHARP \
[2]mlx5_4:1/IB/SHARP [3]mlx5_5:1/IB/SHARP [RO]; OOB ibp25s0:10.20.0.119<0>
qh100-gpu19:49357:49418 [3] NCCL INFO Using network IBext
"""
EFA = """\
algo-1:462:462 [0] NCCL INFO Bootstrap : Using eth0:10.200.5.135<0>
algo-1:462:462 [0] NCCL INFO NET/OFI Using aws-ofi-nccl 1.3.0aws
algo-1:462:462 [0] NCCL INFO NET/OFI Selected Provider is efa
algo-1:462:462 [0] NCCL INFO Using network AWS Libfabric
NCCL version 2.10.3+cuda11.3
algo-1:18060:20786 [3] NCCL INFO Channel 04/1 : 3[3] -> 10[2] [send] via NET/AWS Libfabric/1(2)/\
GDRDMA/Shared
"""
FELL_BACK = """\
ip-10-36-29-253:86:2554 [0] nccl_net_ofi_init:155 NCCL WARN NET/OFI Initializing plugin failed
ip-10-36-29-253:86:2554 [0] NCCL INFO NET/IB : No device found.
ip-10-36-29-253:86:2554 [0] NCCL INFO NET/Socket : Using [0]eth0:10.36.29.253<0>
ip-10-36-29-253:86:2554 [0] NCCL INFO Using network Socket
"""
ONE_NODE = """\
VM-16-64-ubuntu:28471:28471 [0] NCCL INFO NCCL version 2.29.2+cuda12.8
VM-16-64-ubuntu:28471:28471 [0] NCCL INFO NET/IB : No device found.
job-worker-0:5663:5809 [0] NCCL INFO Channel 04/0 : 0[0] -> 7[7] via P2P/CUMEM
myles:6742:6767 [1] NCCL INFO Channel 01/0 : 1[1] -> 0[0] via P2P/direct pointer
"""
# As libnccl.so.2 of 2.32.3 (nvidia-nccl-cu12 of PyPI) words them.
NEW = """\
n0:11733:11733 [0] NCCL INFO Bootstrap: Using eth0:192.0.2.2<0>
n0:11733:11733 [0] NCCL INFO NCCL version 2.32.3+cuda12.9
n0:11733:11774 [0] NCCL INFO NET/IB : Using [0]mlx5_0:1/IB [1]mlx5_1:1/IB [RO]; \
OOB eth0:192.0.2.2<0>
n0:11733:11774 [0] NCCL INFO Initialized NET plugin IB
n0:11733:11774 [0] NCCL INFO Assigned NET plugin IB to comm
n0:11733:11774 [0] NCCL INFO Using network IB
n0:11733:11774 [0] NCCL INFO Channel 00/0 : 0[0] -> 4[0] [send] via NET/IB/0/GDRDMA
n0:11733:11774 [0] NCCL INFO Channel 00/0 : 4[0] -> 0[0] [receive] via NET/IB/0/GDRDMA
n0:11733:11774 [0] NCCL INFO Channel 01 : 0[0] -> 1[1] via SHM/direct
"""
# What that version prints, with INFO, where there is no GPU.
WITHOUT_GPU = """\
n0:11733:11733 [0] NCCL INFO ENV/Plugin: Could not find: libnccl-env.so
n0:11733:11733 [0] NCCL INFO Bootstrap: Using eth0:192.0.2.2<0>

[2026-11-29 17:28:15] n0:11733:11733 [0] init.cc:2955 (ncclCommInitRank) NCCL WARN Cuda failure \
'CUDA driver version is insufficient for CUDA runtime version'
n0:11733:11774 [0] NCCL INFO Socket handshake magic 0x564ab9f2fc4b9d6c (built-in default)
"""
AMD = """\
g1064:11143:11143 [0] NCCL INFO RCCL version 2.13.4+hip5.2 HEAD:6b8d2b0
g1072:1263985:1264007 [0] NCCL INFO Channel 02/0 : 1[c6000] -> 4[c1000] [receive] via NET/Socket/1 \
comm 0x95cdeb0 nRanks 08
g1072:1263988:1264006 [3] NCCL INFO Channel 00/0 : 7[ce000] -> 5[c6000] via P2P/IPC comm 0xfb16e30 \
nRanks 08
"""


@pytest.mark.parametrize(
    ("text", "nodes", "expected"),
    [
        (OLD, 2, "NCCL 2.4.7"),
        (
            INFINIBAND,
            2,
            "NCCL 2.19.3; between nodes IB (mlx5_10, mlx5_11), GPUDirect; inside a node P2P/CUMEM",
        ),
        (INFINIBAND, 1, "NCCL 2.19.3; inside a node P2P/CUMEM"),
        (
            EXTENDED,
            2,
            "between nodes IBext (mlx5_0, mlx5_1, mlx5_4, mlx5_5) by NCCL RDMA Plugin v6",
        ),
        (
            EFA,
            2,
            "NCCL 2.10.3; between nodes AWS Libfabric (efa) by aws-ofi-nccl 1.3.0aws, GPUDirect",
        ),
        (FELL_BACK, 2, "between nodes Socket (eth0)"),
        (ONE_NODE, 1, "NCCL 2.29.2; inside a node P2P/CUMEM, P2P/direct pointer"),
        (AMD, 2, "RCCL 2.13.4; between nodes Socket, without GPUDirect; inside a node P2P/IPC"),
        (
            NEW,
            2,
            "NCCL 2.32.3; between nodes IB (mlx5_0, mlx5_1), GPUDirect; inside a node SHM/direct",
        ),
        (WITHOUT_GPU, 2, ""),
        ("", 2, ""),
    ],
)
def test_the_way_in_words(text: str, nodes: int, expected: str) -> None:
    assert describe(parse(text), nodes) == expected


def test_ranks_see_parts_of_it() -> None:
    """One that talks to no other node, and one of which a channel goes through the host."""
    slow = INFINIBAND.replace("/GDRDMA", "").replace("NCCL version", "version")
    whole = combine([parse(ONE_NODE), parse(INFINIBAND), parse(slow), Transport()])
    assert whole.library == "NCCL 2.29.2"
    assert whole.between == ("IB",)
    assert whole.gpudirect is False


@pytest.mark.parametrize(
    ("cards", "words"),
    [
        ({"EFA": ("rdmap16s27",)}, "rdmap16s27 (EFA): its plug-in aws-ofi-nccl is missing"),
        ({"Slingshot": ("cxi0", "cxi1")}, "cxi0, cxi1 (Slingshot): its plug-in aws-ofi-nccl"),
        ({"InfiniBand or RoCE": ("mlx5_0",)}, "mlx5_0 (InfiniBand or RoCE): libibverbs is missing"),
        ({"Omni-Path": ("hfi1_0",)}, "hfi1_0 (Omni-Path): a plug-in for it is missing"),
    ],
)
def test_sockets_beside_a_fast_network(cards: dict[str, tuple[str, ...]], words: str) -> None:
    slow = parse(FELL_BACK, cards)
    trouble = find_trouble(slow, 2)
    assert trouble is not None
    assert words in trouble
    finding = judge_transport(slow, 2)
    assert finding.status == "warn"
    assert "over plain sockets" in finding.fact
    assert "missing" in finding.fix
    assert find_trouble(slow, 1) is None
    assert find_trouble(parse(INFINIBAND, cards), 2) is None
    assert find_trouble(parse(FELL_BACK), 2) is None


def test_cards_of_a_node(tmp_path: Path) -> None:
    assert fast_cards(tmp_path) == {}
    (tmp_path / "cxi" / "cxi0").mkdir(parents=True)
    for card, driver in (("mlx5_0", "mlx5_core"), ("rdmap0", "efa"), ("hfi1_0", "hfi1")):
        (tmp_path / "drivers" / driver).mkdir(parents=True)
        device = tmp_path / "infiniband" / card / "device"
        device.mkdir(parents=True)
        (device / "driver").symlink_to(tmp_path / "drivers" / driver)
    assert fast_cards(tmp_path) == {
        "Slingshot": ("cxi0",),
        "Omni-Path": ("hfi1_0",),
        "InfiniBand or RoCE": ("mlx5_0",),
        "EFA": ("rdmap0",),
    }


def test_the_log_lies_where_nobody_else_can_plant_it() -> None:
    environ: dict[str, str] = {}
    log = NcclLog.begin(environ)
    assert log is not None
    folder = Path(environ["NCCL_DEBUG_FILE"]).parent
    assert folder.stat().st_mode & 0o077 == 0
    assert (environ["NCCL_DEBUG"], environ["NCCL_DEBUG_SUBSYS"]) == ("INFO", "INIT,NET")
    (folder / "log.17").write_text(INFINIBAND)
    assert log.read().library == "NCCL 2.19.3"
    log.close()
    assert not folder.exists()
    assert log.read().library == ""


@pytest.mark.parametrize("name", ["NCCL_DEBUG", "NCCL_DEBUG_FILE"])
def test_what_the_user_has_said_of_the_log_stays(name: str) -> None:
    environ = {name: "WARN"}
    assert NcclLog.begin(environ) is None
    assert environ == {name: "WARN"}
