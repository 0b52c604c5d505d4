"""Which collective holds the ranks up, and who has not entered it: from torch's flight recorders.

A rank's record lists its last collectives in the order of its calls, each with a number that counts
the collectives of its process group. So ranks can be compared: those that wait are in a collective
that others have not come to.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MOST_GROUPS = 8
_NAME_CHARACTERS = 80


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupPosition:
    """How far one rank has come in the collectives of one process group.

    Attributes:
        group: name of the process group.
        last: number of the last collective that the rank has called.
        pending: number of the first one that it still waits for, 0 where it waits for none.
        name: of that, or else of the last: "gloo:all_reduce of 340 Float".
    """

    group: str
    last: int
    pending: int
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldUp:
    """A collective that some ranks wait in.

    Attributes:
        number: of the collective, within its process group.
        waiting: ranks, by what each of them takes the collective to be; more than one name means
            that the ranks call collectives in different orders.
        absent: ranks of the group that have not entered it.
    """

    number: int
    waiting: Mapping[str, Sequence[int]]
    absent: Sequence[int]


def positions(record: bytes) -> list[GroupPosition]:
    """Return how far a rank has come in each process group, by its flight recorder's JSON.

    Raises:
        ValueError, KeyError, TypeError: if it is none.
    """
    by_group: dict[str, list[dict[str, Any]]] = {}
    for entry in json.loads(record).get("entries", []):
        if not entry["is_p2p"]:
            by_group.setdefault(str(entry["process_group"][0]), []).append(entry)
    return [_position(group, by_group[group]) for group in sorted(by_group)[:MOST_GROUPS]]


def _position(group: str, entries: Sequence[Mapping[str, Any]]) -> GroupPosition:
    ordered = sorted(entries, key=_number)
    # torch retires what has ended; NCCL's entries say "completed" a little earlier.
    pending = [each for each in ordered if not each["retired"] and each["state"] != "completed"]
    shown = (pending or ordered[-1:])[0]
    return GroupPosition(
        group=group,
        last=_number(ordered[-1]),
        pending=_number(pending[0]) if pending else 0,
        name=_name(shown),
    )


def _number(entry: Mapping[str, Any]) -> int:
    return int(entry["collective_seq_id"])


def _name(entry: Mapping[str, Any]) -> str:
    name = str(entry["profiling_name"])
    elements = 0
    for size in entry["input_sizes"]:
        count = 1
        for length in size:
            count *= int(length)
        elements += count
    if elements:
        name = f"{name} of {elements:,} {entry['input_dtypes'][0]}"
    return name[:_NAME_CHARACTERS]


def held_up(ranks: Mapping[int, Sequence[GroupPosition]]) -> HeldUp | None:
    """Return the collective that ranks wait in while others have not come to it.

    Where all have entered the same one, it is that: then it is the network that does not get on.

    Args:
        ranks: how far each has come; a rank whose record could not be had is not in it.

    Returns:
        None if no rank waits in a collective.
    """
    found = list(_candidates(ranks))
    telling = [each for each in found if each.absent or len(each.waiting) > 1]
    return next(iter(telling or found), None)


def _candidates(ranks: Mapping[int, Sequence[GroupPosition]]) -> Iterator[HeldUp]:
    groups = sorted({position.group for own in ranks.values() for position in own})
    for group in groups:
        members = {
            rank: position
            for rank, own in ranks.items()
            for position in own
            if position.group == group
        }
        pending = [position.pending for position in members.values() if position.pending]
        if not pending:
            continue
        # What comes later waits for this one.
        number = min(pending)
        waiting: dict[str, list[int]] = {}
        for rank, position in sorted(members.items()):
            if position.pending == number:
                waiting.setdefault(position.name, []).append(rank)
        absent = [rank for rank, position in members.items() if position.last < number]
        yield HeldUp(number=number, waiting=waiting, absent=sorted(absent))
