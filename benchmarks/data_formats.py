"""Samples of `benchmarks/data.py` in the format of a peer.

python benchmarks/data_formats.py PEER VALUES.npy FOLDER
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

import numpy as np

Samples = np.ndarray[Any, Any]
SHARDS = 8


def webdataset(values: Samples, folder: Path) -> None:
    import webdataset as wds

    folder.mkdir()
    most = -(-len(values) // SHARDS)
    with wds.ShardWriter(f"{folder}/%03d.tar", maxcount=most, verbose=0) as writer:
        for row, value in enumerate(values):
            writer.write({"__key__": f"{row:08}", "x.npy": value, "y.cls": row % 10})


def one(path: str, row: int) -> dict[str, Any]:
    return {"x": np.load(path, mmap_mode="r")[row].copy(), "y": row % 10}


def litdata(values: Samples, folder: Path) -> None:
    from litdata import optimize

    optimize(
        fn=functools.partial(one, sys.argv[2]),
        inputs=list(range(len(values))),
        output_dir=str(folder),
        chunk_bytes=max(values.nbytes // SHARDS, 2 * values[0].nbytes),
        num_workers=1,
    )


def streaming(values: Samples, folder: Path) -> None:
    from streaming import MDSWriter

    shape = ",".join(map(str, values.shape[1:]))
    columns = {"x": f"ndarray:{values.dtype.name}:{shape}", "y": "int"}
    limit = max(values.nbytes // SHARDS, 2 * values[0].nbytes)
    with MDSWriter(out=str(folder), columns=columns, size_limit=limit) as writer:
        for row, value in enumerate(values):
            writer.write({"x": value, "y": row % 10})


if __name__ == "__main__":
    {"webdataset": webdataset, "litdata": litdata, "streaming": streaming}[sys.argv[1]](
        np.load(sys.argv[2], mmap_mode="r"), Path(sys.argv[3])
    )
