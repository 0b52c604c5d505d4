"""What training.json of a checkpoint has to be: checked before anything of it is used."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

from annotated_types import Ge, Lt

from hpctrain.checkpoint.format import VALUES, Count
from hpctrain.checkpoint.load import Loaded
from hpctrain.errors import CheckpointError
from hpctrain.utils.json_files import checked


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    """Where the run stood."""

    step: Count
    epoch: Count
    position: Count
    samples_seen: Count


@dataclass(frozen=True, slots=True, kw_only=True)
class _Generators:
    """What is not tensors of the random generators of a rank."""

    numpy: tuple[str, int, int, float]
    python: tuple[int, float | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Normalization:
    """The numbers of a field, and what the config said of it."""

    given: str | dict[str, Any]
    mean: list[float]
    std: list[float]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Group:
    """What a group of parameters has learned, see `hpctrain.checkpoint.optimizer_state`."""

    parameters: list[str]
    learned: dict[str, Any]
    arguments: dict[str, tuple[Any, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Optimizer:
    """What is not tensors of the optimizer, see `hpctrain.checkpoint.optimizer_state`."""

    kind: str
    slots: dict[str, list[tuple[Any, Any]]]
    other: list[tuple[Any, Any]]
    groups: list[_Group]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Values:
    """training.json; keys that are not named here belong to whoever reads them.

    Attributes:
        data: the place in the data, which `hpctrain.data.order.state` checks.
        optimizer: None where 0.1.0 has written it.
        extra_state: of modules that have one, by name.
        registered: of further objects, by name.
        logged: by each rank in the epoch under way, of a module; None of any other task.
        schedule: state of a schedule that has one.
    """

    place: _Place
    data: dict[str, Any]
    world_size: Annotated[int, Ge(1), Lt(2**31)]
    device: str
    threads: Count
    scaler: dict[str, float]
    generators: list[_Generators]
    total_steps: Count
    lr: float
    metrics: dict[str, float]
    decoding: dict[str, str] = field(default_factory=dict)
    optimizer: _Optimizer | None = None
    extra_state: dict[str, Any] = field(default_factory=dict)
    registered: dict[str, Any] = field(default_factory=dict)
    logged: list[Any] = field(default_factory=list)
    normalization: dict[str, _Normalization] = field(default_factory=dict)
    schedule: dict[str, str | float | None] | None = None
    evaluation_owed: bool = False


def check_values(loaded: Loaded) -> Loaded:
    """Return a checkpoint whose training.json makes sense.

    Raises:
        CheckpointError: if it does not; it names the first place.
    """
    path = loaded.path / VALUES
    try:
        values = checked(loaded.values, _Values)
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    if len(values.generators) != values.world_size:
        raise CheckpointError(
            f"{path} is damaged: generators of {len(values.generators)} ranks, and world_size is "
            f"{values.world_size}"
        )
    return loaded
