"""What the meta.json of a checkpoint has to be, as types.

A checksum tells whether it is what was written; this tells whether it makes sense.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from annotated_types import Ge, Lt

Count = Annotated[int, Ge(0), Lt(2**63)]
Shapes = dict[str, list[Count]]


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
        versions: of what it ran on.
    """

    job: Count | None
    modules: dict[str, Module] | None
    versions: dict[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Meta:
    """meta.json.

    Attributes:
        made_by: None where 0.1.0 has written it, or no job of a run.
        weights: the sets of them that it holds: those of "training", and for "evaluation".
        versions: of what has written it.
        aliases: further names of tensors, and the names that they are stored under.
        metrics: of an evaluation at this very step.
        keep_best: metric and mode by which the run keeps its best checkpoint.
        spread: number of writers as `ranks`, and by file the shapes of what is spread over them.
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
