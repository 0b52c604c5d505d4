"""Names, interface and the skew between ranks, judged on tables."""

from __future__ import annotations

import pytest
from helpers.preflight_tables import rank

from hpctrain.preflight.network import (
    Lookup,
    judge_arrival,
    judge_clocks,
    judge_interface,
    judge_names,
    judge_speed,
)


def lookup(host: str, own: str | None, rank_zero: str | None, seconds: float = 0.0) -> Lookup:
    return Lookup(
        host=host,
        own=(own,) if own else (),
        rank_zero=(rank_zero,) if rank_zero else (),
        seconds=seconds,
    )


@pytest.mark.parametrize(
    ("lookups", "agreed", "status", "words"),
    [
        ([lookup("a", "127.0.1.1", "127.0.1.1")], (), "pass", "a is 127.0.1.1"),
        ([lookup("a", None, None)], (), "warn", "the own name of a does not resolve"),
        ([lookup("a", "10.0.0.1", "10.0.0.1", seconds=9)], (), "warn", "takes 9.00 s"),
        (
            [lookup("a", "10.0.0.1", "10.0.0.1"), lookup("b", "10.0.0.2", "10.0.0.1")],
            ("10.0.0.1",),
            "pass",
            "all met at 10.0.0.1",
        ),
        (  # Debian's own entry
            [lookup("a", "127.0.1.1", "127.0.1.1"), lookup("b", "10.0.0.2", "10.0.0.1")],
            ("10.0.0.1",),
            "warn",
            "a resolves to 127.0.1.1 on itself",
        ),
        (  # a management network
            [lookup("a", "10.8.0.1", "10.8.0.1"), lookup("b", "10.8.0.2", "10.8.0.1")],
            ("10.0.0.1",),
            "warn",
            "leads elsewhere than the agreed 10.0.0.1: b: 10.8.0.1",
        ),
        (
            [lookup("a", "10.0.0.1", "10.0.0.1"), lookup("b", "10.0.0.2", None)],
            ("10.0.0.1",),
            "warn",
            "b: not at all",
        ),
    ],
)
def test_names(lookups: list[Lookup], agreed: tuple[str, ...], status: str, words: str) -> None:
    finding = judge_names(lookups, agreed)
    assert (finding.status, words in finding.fact) == (status, True), finding


@pytest.mark.parametrize(
    ("num_nodes", "speeds", "status", "words"),
    [
        (1, {"eth0": 1000, "hsn0": 200_000}, "pass", "one node"),
        (2, {"eth0": 1000, "hsn0": 200_000}, "warn", "hsn0 there has 200,000"),
        (2, {"eth0": 25_000, "hsn0": 200_000}, "pass", "reached from every node"),
        (2, {"eth0": 0, "hsn0": 200_000}, "pass", "reached"),  # the driver does not tell
    ],
)
def test_interface(num_nodes: int, speeds: dict[str, int], status: str, words: str) -> None:
    ranks = [
        rank(i, node_rank=i % num_nodes, interface="eth0", link_speeds=speeds) for i in range(2)
    ]
    finding = judge_interface(ranks)
    assert (finding.status, words in finding.fact) == (status, True), finding


def test_skew() -> None:
    hosts = ["a", "b", "b"]
    assert judge_clocks([0.0, 0.01, -0.02], hosts).status == "pass"
    late = judge_clocks([0.0, 0.01, -7.5], hosts)
    assert (late.status, late.fact) == ("warn", "b is -7.500 s from rank 0's a")
    assert judge_arrival([0.0, 0.01, 0.02], hosts).status == "pass"
    arrival = judge_arrival([0.5, 0.01, 0.5], hosts)
    assert arrival.status == "warn"
    assert "rank 1 on b comes last, by 490 ms" in arrival.fact
    assert judge_speed([1.0, 1.1, 1.2], hosts).status == "pass"
    slow = judge_speed([1.0, 1.0, 3.0], hosts)
    assert slow.status == "warn"
    assert "rank 2 on b (3.00 x)" in slow.fact
