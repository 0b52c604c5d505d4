"""Which fields a task sees, and which of them the files hold; the others are masks."""

from __future__ import annotations

from hpctrain.config.schema import Config


def seen_fields(config: Config) -> list[str]:
    """Return the fields that the task has named, masks among its inputs included."""
    return list(dict.fromkeys([*config.task.inputs, *filter(None, [config.task.target])]))


def needed_fields(config: Config) -> list[str]:
    """Return the fields that have to be there when the task sees a batch."""
    mask = target_mask(config)
    return list(dict.fromkeys([*seen_fields(config), *filter(None, [mask])]))


def target_mask(config: Config) -> str | None:
    """Return the mask of what the loss compares the model's output with."""
    return masks(config).get(config.task.target or "")


def masks(config: Config) -> dict[str, str]:
    """Return, by field, the mask that says where it has a value."""
    tables = config.data.fields
    return {name: table.mask for name, table in tables.items() if table.mask is not None}


def stored_fields(config: Config) -> list[str]:
    """Return the fields that are read from files."""
    made = set(masks(config).values())
    return [name for name in seen_fields(config) if name not in made]


def integer_fields(config: Config) -> frozenset[str]:
    """Return the fields that are used as integers, if the files hold such.

    That are classes and tokens. What is normalised, or an input of any other task, is used as
    numbers, between which there may be others.
    """
    tables = config.data.fields
    said = {name for name, table in tables.items() if table.decode == "integers"}
    meant = set(filter(None, [config.task.target]))
    if config.task.use == "language_modeling":
        meant |= set(config.task.inputs)
    return frozenset(said | (meant - set(config.data.normalize)))
