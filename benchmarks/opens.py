"""What training asks of a parallel file system at 1 to 4,096 ranks, simulated without any I/O.

    python benchmarks/opens.py
    python benchmarks/opens.py --gigabytes 1000 --row-bytes 2050 --targets 128

One epoch of a dataset in shards of 256 MB, which lie on storage targets in turn. Nothing is read:
the functions that decide what training reads are asked, and what they answer is counted.
"""

from __future__ import annotations

import argparse
from collections import OrderedDict

import numpy as np

from hpctrain.data.order.epochs import Epoch
from hpctrain.data.order.order import Order, default_block_rows, default_lanes, lanes_of_rank
from hpctrain.data.reading.handles import MOST_OPEN_FILES
from hpctrain.data.writer import SHARD_BYTES

RANKS = (1, 4, 16, 64, 256, 1024, 4096)
WINDOW = 4


def main() -> None:
    options = parse()
    samples = int(options.gigabytes * 1e9) // options.row_bytes
    shard_rows = SHARD_BYTES // options.row_bytes
    shards = -(-samples // shard_rows)
    print(
        f"{samples:,} samples of {options.row_bytes:,} bytes in {shards} shards on "
        f"{options.targets} targets; {options.batch} samples per rank and step"
    )
    head = ("ranks", "lanes", "block", "requests", "opens of", "opens", "MB of a", "busiest target")
    unit = ("", "", "KB", "of a rank", "a rank", "of all", "target", "over mean")
    for line in (head, unit):
        print(" ".join(f"{each:>14}" for each in line))
    for ranks in RANKS:
        print(" ".join(f"{each:>14}" for each in simulate(ranks, samples, shard_rows, options)))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Opens, bytes and requests, without I/O.")
    parser.add_argument("--gigabytes", type=float, default=100.0, help="of the dataset")
    parser.add_argument("--row-bytes", type=int, default=12_289, help="of one sample")
    parser.add_argument("--targets", type=int, default=64, help="storage targets (OSTs)")
    parser.add_argument("--batch", type=int, default=16, help="samples per rank and step")
    return parser.parse_args()


def simulate(ranks: int, samples: int, shard_rows: int, options: argparse.Namespace) -> list[str]:
    """Return one line of the table: an epoch of so many ranks."""
    # A batch grows with the ranks, up to where more would not train any better.
    lanes = default_lanes(max(ranks, min(ranks * options.batch, 1024)))
    block_rows = default_block_rows(samples, options.row_bytes, lanes, WINDOW)
    order = Order(samples=samples, seed=0, lanes=lanes, window=WINDOW, block_rows=block_rows)
    epoch = Epoch(order, 0)
    every_lane = np.arange(lanes, dtype=np.int64)
    lane_samples = order.lane_samples(every_lane)
    next_rows = np.zeros(lanes, np.int64)
    num_shards = -(-samples // shard_rows)

    shard_bytes = np.zeros(num_shards, np.int64)
    requests = np.zeros(ranks, np.int64)
    opens = {rank: Opens() for rank in sorted({0, ranks // 2, ranks - 1})}
    busiest: list[float] = []
    while (going := every_lane[next_rows < lane_samples]).size:
        windows, runs = epoch.windows(going, next_rows[going])
        next_rows[going] = windows.stops
        of_rank = going[runs.owners] % ranks
        shard = runs.rows // shard_rows
        np.add.at(shard_bytes, shard, runs.counts * options.row_bytes)
        requests += np.bincount(of_rank, minlength=ranks)
        for rank, counted in opens.items():
            counted.read(shard[of_rank == rank].tolist())
        # Staggered windows spread over the time in which one of them is used up.
        together = np.bincount(shard % options.targets, minlength=options.targets)
        busiest.append(together.max() / together.mean())
    assert all(set(lanes_of_rank(rank, ranks, lanes)) for rank in opens)
    of_target = np.bincount(
        np.arange(num_shards) % options.targets, weights=shard_bytes, minlength=options.targets
    )
    per_rank = float(np.mean([counted.count for counted in opens.values()]))
    return [
        f"{ranks:,}",
        f"{lanes:,}",
        f"{block_rows * options.row_bytes / 1e3:,.0f}",
        f"{requests.mean():,.0f}",
        f"{per_rank:,.0f}",
        f"{per_rank * ranks:,.0f}",
        f"{of_target.mean() / 1e6:,.0f}",
        f"{np.median(busiest):.2f}",
    ]


class Opens:
    """How often one rank opens files, if it keeps as many open as a reader does."""

    def __init__(self) -> None:
        self.count = 0
        self._kept: OrderedDict[int, None] = OrderedDict()

    def read(self, shards: list[int]) -> None:
        for shard in shards:
            if shard in self._kept:
                self._kept.move_to_end(shard)
                continue
            if len(self._kept) >= MOST_OPEN_FILES:
                self._kept.popitem(last=False)
            self._kept[shard] = None
            self.count += 1


if __name__ == "__main__":
    main()
