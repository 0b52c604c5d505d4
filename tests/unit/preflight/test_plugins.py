"""NCCL's plug-in for the network: found in folders as NCCL does, and judged on facts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hpctrain.preflight.plugins import Plugin, find_plugin, judge_plugin

SLINGSHOT = {"Slingshot": ("cxi0", "cxi1")}
GOOD = {
    "path": "/site/libnccl-net.so",
    "version": "1.20.0",
    "libfabric": "/site/libfabric.so.1",
    "libfabric_version": "1.22.0",
}


def plugin(**changed: Any) -> Plugin:
    return Plugin(**({"cards": SLINGSHOT} | changed))


@pytest.mark.parametrize(
    ("facts", "nccl", "num_nodes", "status", "words"),
    [
        ({"cards": {}}, "2.27.3", 2, "pass", "none is needed"),
        ({}, "2.27.3", 1, "pass", "none is needed"),
        ({}, "2.27.3", 2, "warn", "Slingshot (cxi0, cxi1) needs a plug-in, and none is loaded:"),
        ({"asked": "none"}, "2.27.3", 2, "warn", "as NCCL_NET_PLUGIN=none says"),
        ({"asked": "ofi", "cards": {}}, "2.27.3", 1, "warn", "no such library is found"),
        (GOOD, "2.27.3", 2, "pass", "aws-ofi-nccl 1.20.0, libfabric 1.22.0, for NCCL 2.27.3"),
        (GOOD | {"version": ""}, "2.10.3", 2, "pass", "/site/libnccl-net.so, libfabric"),
        (GOOD, "2.16.2", 2, "warn", "needs NCCL 2.17.1 or later, and torch brings 2.16.2"),
        (GOOD | {"version": "1.9.1"}, "2.16.2", 2, "pass", "1.9.1"),
        (
            GOOD | {"version": "1.9.1", "libfabric_version": "1.15.2"},
            *("2.19.4", 2, "warn", "needs libfabric 1.18 or later"),
        ),
        (GOOD | {"libfabric": "", "libfabric_version": ""}, "2.27.3", 2, "warn", "libfabric.so.1"),
        (GOOD | {"host_libfabric": "1.22.0"}, "2.27.3", 2, "pass", "1.22.0"),
        (
            GOOD | {"libfabric_version": "1.15.2", "host_libfabric": "1.22.0"},
            *("2.27.3", 2, "warn", "(1.15.2) is older than the libfabric 1.22.0 that the host"),
        ),
    ],
)
def test_plugins_that_fit_and_others(
    facts: dict[str, Any], nccl: str, num_nodes: int, status: str, words: str
) -> None:
    finding = judge_plugin({"n0": plugin(**facts)}, nccl, num_nodes)
    assert (finding.status, words in finding.fact) == (status, True), finding
    assert bool(finding.fix) == (status == "warn")


def test_the_node_that_lacks_it_is_named() -> None:
    finding = judge_plugin({"n0": plugin(**GOOD), "n1": plugin()}, "2.27.3", 2)
    assert finding.fact.startswith("n1: Slingshot")


def test_it_is_found_where_nccl_finds_it(tmp_path: Path) -> None:
    """In the order of LD_LIBRARY_PATH; its version and that of libfabric are in their files."""
    first, second = tmp_path / "first", tmp_path / "second"
    (second / "pkgconfig").mkdir(parents=True)
    first.mkdir()
    greeting = b"\x7fELF\0NET/OFI Initializing aws-ofi-nccl 1.13.2-aws\n\0"
    (second / "libnccl-net.so").write_bytes(greeting)
    (second / "libnccl-net-other.so").write_bytes(b"")
    (second / "libfabric.so.1.26.0").touch()
    (second / "libfabric.so.1").symlink_to("libfabric.so.1.26.0")
    (second / "pkgconfig" / "libfabric.pc").write_text("Name: libfabric\nVersion: 1.22.0\n")
    environ = {
        "LD_LIBRARY_PATH": f"{first}::{second}",
        "LOADEDMODULES": "craype/2.7:libfabric/1.22.0:rocm/6.4",
    }

    def find(is_rocm: bool = False, **more: str) -> Plugin:
        return find_plugin(environ | more, {}, is_rocm=is_rocm, folders=[])

    found = find()
    assert found == Plugin(
        path=str(second / "libnccl-net.so"),
        version="1.13.2",
        libfabric=str(second / "libfabric.so.1"),
        libfabric_version="1.22.0",
        host_libfabric="1.22.0",
        cards={},
    )
    (first / "librccl-net.so").write_bytes(greeting.replace(b"nccl", b"rccl"))
    assert find().path == found.path
    assert find(is_rocm=True).path == str(first / "librccl-net.so")
    other = find(NCCL_NET_PLUGIN="other")
    assert (Path(other.path).name, other.version) == ("libnccl-net-other.so", "")
    assert find(NCCL_NET_PLUGIN="none").path == ""
    assert find(NCCL_NET_PLUGIN=found.path).path == found.path
    assert find(NCCL_NET_PLUGIN="gone").path == ""
