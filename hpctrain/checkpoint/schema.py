"""What the meta.json of a checkpoint has to be, as types.

A checksum tells whether it is what was written; this tells whether it makes sense.
"""

from __future__ import annotations

from dataclasses import dataclass
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
class Meta:
    """meta.json.

    Attributes:
        aliases: further names of tensors, and the names that they are stored under.
        metrics: of an evaluation at this very step.
        spread: number of writers as `ranks`, and by file the shapes of what is spread over them.
        xxh3_64: checksum of all the rest.
    """

    step: Count
    files: dict[str, FileFacts]
    aliases: dict[str, str]
    metrics: dict[str, float] | None
    spread: dict[str, Annotated[int, Ge(1), Lt(2**24)] | Shapes] | None = None
    xxh3_64: str
