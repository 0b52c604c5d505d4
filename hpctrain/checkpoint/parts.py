"""Checkpoints of several writers: which rows of which tensor are in which rank's file.

step-00000120/
  model-00000.safetensors      rank 0's rows of every parameter, and all that is not spread
  model-00001.safetensors      rank 1's rows
  training-00000.safetensors   the same of the optimizer's state
  ...

The other files are those of any checkpoint, see `hpctrain.checkpoint.layout`; meta.json has the
number of ranks and the shapes of the whole tensors as `spread`. Of a tensor of n rows rank r of W
has rows r c up to (r + 1) c, where c is n / W rounded up; it has no tensor where these are none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from hpctrain.checkpoint.layout import MODEL, TRAINING, read_file
from hpctrain.checkpoint.raw import RawTensor, raw_tensors
from hpctrain.errors import CheckpointError

T = TypeVar("T")


def rows_of(length: int, ranks: int, rank: int) -> tuple[int, int]:
    """Return the first row of a rank, and the one after its last.

    Source: torch.chunk, by which FSDP2 cuts parameters.
    """
    each = -(-length // ranks)
    return min(rank * each, length), min((rank + 1) * each, length)


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """How the tensors of a checkpoint are spread over its writers.

    Attributes:
        ranks: that have written it.
        shapes: of all whole tensors that are spread, by the name of the file and their own.
    """

    ranks: int
    shapes: Mapping[str, Mapping[str, tuple[int, ...]]]

    @classmethod
    def of(cls, meta: Mapping[str, Any]) -> Spread | None:
        """Return what meta.json says; None of a checkpoint of one writer."""
        found = meta.get("spread")
        if found is None:
            return None
        shapes = {
            file: {name: tuple(shape) for name, shape in found[file].items()}
            for file in (MODEL, TRAINING)
        }
        return cls(ranks=found["ranks"], shapes=shapes)

    def to_json(self) -> dict[str, Any]:
        """Return what meta.json is to say."""
        return {"ranks": self.ranks, **{file: dict(self.shapes[file]) for file in self.shapes}}

    def pieces(self, file: str, name: str, first: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Yield where rows of a tensor are: (rank, first and stop row within its part)."""
        length = self.shapes[file][name][0]
        for rank in range(self.ranks):
            begin, end = rows_of(length, self.ranks, rank)
            low, high = max(begin, first), min(end, stop)
            if low < high:
                yield rank, low - begin, high - begin


def part_name(file: str, rank: int) -> str:
    """Return the name of a rank's part of `model.safetensors` or `training.safetensors`."""
    stem, dot, kind = file.partition(".")
    return f"{stem}-{rank:05d}{dot}{kind}"


def join(
    spread: Spread,
    file: str,
    read: Callable[[str], dict[str, T]],
    concatenate: Callable[[Sequence[T], tuple[int, ...]], T],
) -> dict[str, T]:
    """Return the whole tensors of all parts of a file.

    Args:
        spread: says where rows are.
        file: `model.safetensors` or `training.safetensors`.
        read: returns the tensors of one part by its name.
        concatenate: makes a whole tensor of its parts, one after the other, of a shape.

    Raises:
        CheckpointError: if a part lacks a tensor.
    """
    parts = [read(part_name(file, rank)) for rank in range(spread.ranks)]
    shapes = spread.shapes[file]
    tensors = {name: item for name, item in parts[0].items() if name not in shapes}
    for name, shape in shapes.items():
        try:
            rows = [parts[rank][name] for rank, *_ in spread.pieces(file, name, 0, shape[0])]
        except KeyError as error:
            raise CheckpointError(f"a part of {file} has no {name}") from error
        tensors[name] = concatenate(rows, shape)
    return tensors


def read_raw(folder: Path, file: str, meta: Mapping[str, Any]) -> dict[str, RawTensor]:
    """Return the whole tensors of a checkpoint, verified, whoever has written them.

    Raises:
        CheckpointError: if a file is missing, or is not what was written.
    """

    def read(name: str) -> dict[str, RawTensor]:
        return raw_tensors(read_file(folder, name, meta), folder / name)

    def concatenate(rows: Sequence[RawTensor], shape: tuple[int, ...]) -> RawTensor:
        return RawTensor(rows[0].dtype, shape, b"".join(item.data for item in rows))

    spread = Spread.of(meta)
    return read(file) if spread is None else join(spread, file, read, concatenate)
