"""What a checkpoint is on disk: a folder of safetensors and JSON, and meta.json written last.

step-00000120/
  model.safetensors      parameters and buffers; loads anywhere
  training.safetensors   optimizer state and random generators
  training.json          everything else of the training state
  config.toml            the resolved config
  meta.json              step, sizes and checksums of the files above, versions

Where every rank writes its own rows of the parameters, as under FSDP, there are instead

  model-00000.safetensors      rank 0's rows of every parameter, and all that is not spread
  model-00001.safetensors      rank 1's rows
  training-00000.safetensors   the same of the optimizer's state
  ...

and meta.json has the number of ranks and the shapes of the whole tensors as `spread`. Of a tensor
of n rows rank r of W has rows r c up to (r + 1) c, where c is n / W rounded up; it has no tensor
where these are none. With checkpoint.files neighbouring ranks share a part, which holds the rows of
them all: `group` in `spread`. Without torch: the tools that inspect checkpoints use it.
"""

from __future__ import annotations

import json
import os
import stat
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeVar

from annotated_types import Ge, Lt

from hpctrain.errors import CheckpointError
from hpctrain.utils.files import checksum, file_checksum
from hpctrain.utils.json_files import (
    LARGE,
    parse_checked,
    parse_json,
    read_whole,
    require_file,
)
from hpctrain.utils.permissions import explained
from hpctrain.utils.run_folder import CHECKPOINTS, LATEST, read_latest, step_of
from hpctrain.utils.text import printable

VERSION = 3
VERSION_OF_RANKS = 2
VERSION_OF_ONE_WRITER = 1
"""What older readers understand; later ones are spread over writers, or groups, see `Spread`."""
FORMAT = "hpctrain checkpoint"
META = "meta.json"
MODEL, TRAINING = "model.safetensors", "training.safetensors"
VALUES, CONFIG = "training.json", "config.toml"
AVERAGE = "average/"
"""Begins the names of the moving averages among the tensors of the training state."""
EVALUATION = "evaluation/"
"""The same of the weights that an optimizer with `train()` and `eval()` evaluates with."""

_REPLACED = ".replaced"

T = TypeVar("T")
Count = Annotated[int, Ge(0), Lt(2**63)]
Shapes = dict[str, list[Count]]


class UnreadableError(CheckpointError):
    """A checkpoint that may be whole, but that cannot be read here and now.

    The permission is missing, the disk or the network fails, or it is of a newer hpctrain. Unlike
    one that is damaged it is not to be passed over: it would be lost to a run that begins anew.
    """


@dataclass(frozen=True, slots=True, kw_only=True)
class MetaHead:
    """What meta.json of any version has."""

    format: str
    version: Annotated[int, Ge(1)]


@dataclass(frozen=True, slots=True, kw_only=True)
class FileFacts:
    """A file of a checkpoint, as it was written."""

    bytes: Count
    xxh3_64: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Module:
    """A module of the user's own, as it was."""

    file: str
    xxh3: str


@dataclass(frozen=True, slots=True, kw_only=True)
class MadeBy:
    """The job that saved a checkpoint.

    Attributes:
        job: its number among those of the run.
        modules: the user's own that were imported, by name.
        versions: of the packages and libraries that it ran on.
    """

    job: Count | None
    modules: dict[str, Module] | None
    versions: dict[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Meta:
    """meta.json.

    Attributes:
        made_by: None where 0.1.0 has written it, or no job of a run.
        weights: sets of weights that it holds: "training", and "evaluation" where there are two.
        versions: of the packages that wrote it.
        aliases: further names of tensors, and the names that they are stored under.
        metrics: results of an evaluation at this very step.
        keep_best: metric and mode by which the run keeps its best checkpoint.
        spread: number of `ranks`, of those that share a part as `group`, and by file the shapes of
            what is spread over them.
        xxh3_64: checksum of all the rest.
    """

    step: Count
    files: dict[str, FileFacts]
    aliases: dict[str, str]
    metrics: dict[str, float] | None
    made_by: MadeBy | None = None
    versions: dict[str, str] = field(default_factory=dict)
    keep_best: dict[str, str] | None = None
    weights: list[str] = field(default_factory=lambda: ["training"])
    spread: dict[str, Annotated[int, Ge(1), Lt(2**24)] | Shapes] | None = None
    xxh3_64: str


def read_meta(folder: Path) -> dict[str, Any]:
    """Return meta.json.

    Raises:
        CheckpointError: if it is missing, damaged, or cannot be read for now.
    """
    path = folder / META
    try:
        content = read_whole(path, LARGE)
        head = parse_checked(content, MetaHead)
        if head.format != FORMAT:
            raise ValueError("it is not the meta.json of a checkpoint")
        if head.version > VERSION:
            raise UnreadableError(
                f"{folder} has format version {head.version}, and this hpctrain reads up to "
                f"{VERSION}: update hpctrain"
            )
        parse_checked(content, Meta)
        meta: dict[str, Any] = parse_json(content)
        for name in meta["files"]:
            if "/" in name or not name.isprintable() or name in ("", ".", ".."):
                raise ValueError(f"{printable(name[:60])!r} is not the name of a file beside it")
        if meta.get("spread") is not None:
            _require_spread(meta["spread"])
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} is not whole: it has no {META}") from error
    except OSError as error:
        raise UnreadableError(f"{path} cannot be read: {explained(error, path)}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    if meta.pop("xxh3_64") != checksum_of_meta(meta):
        raise CheckpointError(f"{path} is damaged: its checksum is not that of its content")
    return meta


def _require_spread(spread: Mapping[str, Any]) -> None:
    """Refuse a spread that lacks a number or a file, or has rows of what has no dimension."""
    for key in ("ranks", *(["group"] if "group" in spread else [])):
        if not isinstance(spread.get(key), int):
            raise ValueError(f"spread.{key} is not a number")
    for file in (MODEL, TRAINING):
        shapes = spread.get(file)
        if not isinstance(shapes, dict) or not all(shapes.values()):
            raise ValueError(f"spread.{file} does not hold the shapes of its tensors")


def read_file(folder: Path, name: str, meta: Mapping[str, Any]) -> bytes:
    """Return the content of a file of a checkpoint, compared with meta.json.

    Raises:
        CheckpointError: if it is missing, cut or changed.
    """
    path = folder / name
    expected = _expected(folder, name, meta)
    with _reading(path):
        content = read_whole(path, expected["bytes"])
    _compare(path, len(content), checksum(content), expected)
    return content


def checksum_of_meta(meta: Mapping[str, Any]) -> str:
    """Return the checksum that meta.json has of its own content."""
    return checksum(json.dumps(meta, sort_keys=True).encode())


def check_file(folder: Path, name: str, meta: Mapping[str, Any]) -> int:
    """Compare a file of a checkpoint with meta.json, a piece at a time.

    Returns:
        Its bytes.

    Raises:
        CheckpointError: if it is missing, cut or changed.
    """
    path = folder / name
    expected = _expected(folder, name, meta)
    with _reading(path):
        length = require_file(path, expected["bytes"])
        digest = file_checksum(path)
    _compare(path, length, digest, expected)
    return length


def _expected(folder: Path, name: str, meta: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what meta.json says of a file."""
    try:
        return meta["files"][name]  # type: ignore[no-any-return]
    except KeyError as error:
        raise CheckpointError(f"{folder / META} is damaged: it has no file {name}") from error


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Tell what the system does not let read from what is not there (any more)."""
    try:
        yield
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing") from error
    except OSError as error:
        raise UnreadableError(f"{path} cannot be read: {explained(error, path)}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error


def _compare(path: Path, length: int, digest: str, expected: Mapping[str, Any]) -> None:
    if length != expected["bytes"]:
        raise CheckpointError(
            f"{path} is damaged: {length} bytes, {expected['bytes']} were written"
        )
    if digest != expected["xxh3_64"]:
        raise CheckpointError(f"{path} is damaged: its checksum is not that of what was written")


def newest_first(checkpoints: Path) -> Iterator[Path]:
    """Yield the folders of checkpoints, whole or not, the newest first.

    Raises:
        CheckpointError: if they cannot be listed; none, where there is no such folder.
    """
    try:
        found = list(checkpoints.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        why = explained(error, checkpoints)
        raise UnreadableError(f"{checkpoints} cannot be listed: {why}") from error
    steps = [(step, path) for path in found if (step := step_of(path.name)) is not None]
    for _, path in sorted(steps, reverse=True):
        yield path


def evaluations(checkpoints: Path) -> list[tuple[int, Mapping[str, float] | None]]:
    """Return (step, metrics of an evaluation at that step) of every checkpoint that is whole.

    Raises:
        CheckpointError: if they cannot be listed.
    """
    found = []
    for path in newest_first(checkpoints):
        with suppress(CheckpointError):
            meta = read_meta(path)
            found.append((meta["step"], meta["metrics"]))
    return found


def set_aside(path: Path) -> None:
    """Move a checkpoint out of the way of a new one of the same step."""
    os.replace(path, path.with_name(f".{path.name}.{time.time_ns()}{_REPLACED}"))


def those_aside(checkpoints: Path) -> list[Path]:
    """Return the folders of checkpoints in whose place new ones were to come."""
    return sorted(checkpoints.glob(f".*{_REPLACED}"), reverse=True)


def put_back(checkpoints: Path) -> None:
    """Give checkpoints their names back where a job was killed before the new ones had them."""
    for aside in those_aside(checkpoints):
        path = aside.with_name(aside.name[1:].partition(".")[0])
        if is_whole(aside) and not path.exists():
            os.replace(aside, path)


def is_run(path: Path) -> bool:
    """Tell whether a folder is one of a run, with checkpoints in it.

    Raises:
        UnreadableError: if it may not be looked into.
    """
    try:
        return stat.S_ISDIR((path / CHECKPOINTS).stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise UnreadableError(f"{path} cannot be read: {explained(error, path)}") from error


def resolved(path: Path) -> Path:
    """Return a checkpoint's folder, from that or from a run folder, whose `latest` is meant.

    Raises:
        CheckpointError: if a run folder has none.
    """
    if not is_run(path):
        return path
    name = read_latest(path)
    if name is None:
        raise CheckpointError(f"{path} has no checkpoint yet: there is no {path / LATEST}")
    return path / CHECKPOINTS / name


def is_whole(path: Path) -> bool:
    """Tell whether a checkpoint was finished; its bytes are not checked."""
    return (path / META).is_file()


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """How the tensors of a checkpoint are spread over its parts.

    Attributes:
        ranks: number of ranks that hold the rows.
        shapes: whole shapes of the tensors that are spread, by file and name.
        group: number of neighbouring ranks whose rows are one part.
    """

    ranks: int
    shapes: Mapping[str, Mapping[str, tuple[int, ...]]]
    group: int = 1

    @property
    def parts(self) -> int:
        """Number of parts, each of which has a file for the model and one for the rest."""
        return -(-self.ranks // self.group)

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
        return cls(ranks=found["ranks"], shapes=shapes, group=found.get("group", 1))

    def to_json(self) -> dict[str, Any]:
        """Return what meta.json is to say."""
        group = {} if self.group == 1 else {"group": self.group}
        shapes = {file: dict(self.shapes[file]) for file in self.shapes}
        return {"ranks": self.ranks, **group, **shapes}

    def pieces(self, file: str, name: str, first: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Yield where rows of a tensor are: (part, first and stop row within it)."""
        length = self.shapes[file][name][0]
        for part in range(self.parts):
            last = min((part + 1) * self.group, self.ranks) - 1
            begin = rows_of(length, self.ranks, part * self.group)[0]
            end = rows_of(length, self.ranks, last)[1]
            low, high = max(begin, first), min(end, stop)
            if low < high:
                yield part, low - begin, high - begin


def rows_of(length: int, ranks: int, rank: int) -> tuple[int, int]:
    """Return the first row of a rank, and the one after its last.

    Source: torch.chunk, by which FSDP2 cuts parameters.
    """
    each = -(-length // ranks)
    return min(rank * each, length), min((rank + 1) * each, length)


def part_name(file: str, part: int) -> str:
    """Return the name of a part of `model.safetensors` or `training.safetensors`."""
    stem, dot, kind = file.partition(".")
    return f"{stem}-{part:05d}{dot}{kind}"


def join(
    spread: Spread,
    file: str,
    read: Callable[[str], dict[str, T]],
    concatenate: Callable[[Sequence[T], tuple[int, ...]], T],
) -> dict[str, T]:
    """Return the whole tensors of all parts of a file.

    Args:
        spread: which part has which rows.
        file: `model.safetensors` or `training.safetensors`.
        read: reader of the tensors of one part, by its file's name.
        concatenate: maker of a whole tensor of a shape from its parts in order.

    Raises:
        CheckpointError: if a part lacks a tensor.
    """
    parts = [read(part_name(file, part)) for part in range(spread.parts)]
    shapes = spread.shapes[file]
    tensors = {name: item for name, item in parts[0].items() if name not in shapes}
    for name, shape in shapes.items():
        try:
            rows = [parts[part][name] for part, *_ in spread.pieces(file, name, 0, shape[0])]
        except KeyError as error:
            raise CheckpointError(f"a part of {file} has no {name}") from error
        tensors[name] = concatenate(rows, shape)
    return tensors
