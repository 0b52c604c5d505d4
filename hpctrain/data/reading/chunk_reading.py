"""Compressed chunks: read in runs, undone by several threads."""

from __future__ import annotations

import os
import time
from typing import NamedTuple

from hpctrain.data.reading.chunks import ChunkedField, ChunkRun, Part
from hpctrain.data.reading.extents import WARM_BYTES_PER_SECOND, announce
from hpctrain.data.reading.filters import UndecodableError
from hpctrain.data.reading.helpers import LEAST_SHARED_BYTES, Helpers, ThreadMemory
from hpctrain.data.reading.outputs import Output
from hpctrain.data.reading.pieces import Piece

RUNS_AHEAD = 8
"""Runs of chunks that are announced to the system ahead of the one being read."""


class ChunkJob(NamedTuple):
    """A run of chunks to read and to undo.

    Attributes:
        shard: index.
        descriptor: of the open file.
        chunks: of the field in the shard.
        run: which of them.
        parts: all rows that the shard is asked for, by row of chunks.
        size: bytes of the run in the file.
    """

    shard: int
    descriptor: int
    chunks: ChunkedField
    run: ChunkRun
    parts: dict[int, list[Part]]
    size: int

    def pieces(self) -> list[Piece]:
        """Return the rows that need one of these chunks."""
        rows = self.chunks.rows_of(self.run)
        return [p for row in rows for p in self.chunks.pieces(self.shard, row, self.parts[row])]


def chunk_jobs(
    shard: int, descriptor: int, chunks: ChunkedField, parts: dict[int, list[Part]]
) -> list[ChunkJob]:
    """Return what is to be done for rows of one shard: each chunk is undone once."""
    return [
        ChunkJob(shard, descriptor, chunks, run, parts, chunks.run_bytes(run))
        for run in chunks.runs(list(parts))
    ]


class ChunkReader:
    """Does such jobs. For one thread at a time; the helpers take part."""

    def __init__(self, helpers: Helpers) -> None:
        self._helpers = helpers
        self._memory = ThreadMemory()
        self._is_cold = True

    def read(self, jobs: list[ChunkJob], output: Output) -> list[Piece]:
        """Read and undo chunks.

        Args:
            jobs: what to read.
            output: takes the rows.

        Returns:
            Rows where that failed, whatever the reason.
        """
        failed: list[ChunkJob] = []
        seconds: list[float] = []
        ahead = jobs if self._is_cold else []

        def read(number: int) -> None:
            for later in ahead[number + RUNS_AHEAD : number + RUNS_AHEAD + 1]:
                announce(later.descriptor, later.run.start, later.size)
            job = jobs[number]
            raw = self._memory.take(job.size)
            begin = time.perf_counter()
            try:
                size = os.preadv(job.descriptor, [raw.data], job.run.start)
                seconds.append(time.perf_counter() - begin)
                if size == job.size:
                    job.chunks.undo(job.run, raw, job.parts, output)
                    return
            except (OSError, UndecodableError):
                pass  # HDF5 meets it again, and says what and where
            failed.append(job)

        for job in ahead[1:RUNS_AHEAD]:
            announce(job.descriptor, job.run.start, job.size)
        self._helpers.each(read, range(len(jobs)))
        total = sum(job.size for job in jobs)
        if total >= LEAST_SHARED_BYTES:  # less takes its time for other reasons
            self._is_cold = total < WARM_BYTES_PER_SECOND * sum(seconds)
        return [piece for job in failed for piece in job.pieces()]
