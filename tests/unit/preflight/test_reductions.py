"""The time of all-reduces, judged on tables; wrong sums are in tests/mpi."""

from __future__ import annotations

import pytest

from hpctrain.preflight.reductions import Reduction, judge_reductions


@pytest.mark.parametrize(
    ("backend", "latency", "large", "status", "words"),
    [
        ("gloo", 0.0005, 0.2, "pass", "64 MiB"),
        ("gloo", 0.05, 0.2, "warn", "latency above 20.0 ms"),
        ("gloo", 0.0005, 5.0, "warn", "bandwidth below 50.0 MB/s"),
        ("nccl", 0.0001, 0.2, "warn", "bandwidth below 1.00 GB/s"),
        ("nccl", 0.0001, 0.01, "pass", "64 MiB"),
    ],
)
def test_reductions(backend: str, latency: float, large: float, status: str, words: str) -> None:
    def of_a_rank(slower: float) -> list[Reduction]:
        return [
            Reduction(num_bytes=8, seconds=latency * slower, repeats=30),
            Reduction(num_bytes=2**26, seconds=large, repeats=3),
        ]

    finding = judge_reductions([of_a_rank(1), of_a_rank(0.5)], backend)
    assert (finding.status, words in finding.fact) == (status, True), finding
    first, last = finding.values["sizes"]
    assert first["seconds"] == latency  # of the slowest rank
    assert last["bus_bytes_per_second"] == pytest.approx(2**26 / large)  # 2 (W - 1) / W is 1
