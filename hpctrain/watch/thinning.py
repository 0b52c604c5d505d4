"""Long curves as short ones that look the same. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from hpctrain.observe.records import NONFINITE, WALL_TIME, flat

MOST_POINTS = 50_000
"""Of all curves of a report together: some 1 MB of it."""

PHASES = "seconds."
"""Beginning of the keys that say how long a phase took since the line before."""

_STRETCHES = 240

_FEWEST, _MOST = 60, 4000
_OF_THE_LINE = frozenset({"kind", "split", "step", "epoch", "samples_seen", WALL_TIME})
_DIGITS = 7


def thinned(values: Sequence[float | None], most: int) -> list[int]:
    """Return the indices of the values to keep: of every stretch its lowest, highest and last.

    A spike, a NaN's gap and the ends stay, which every n-th value would lose.

    Args:
        values: of a curve; None where it has a gap.
        most: how many to keep, at most, 4 at least.
    """
    count = len(values)
    if count <= most:
        return list(range(count))
    kept = {0, count - 1}
    stretches = (most - 2) // 3
    for stretch in range(stretches):
        first, stop = stretch * count // stretches, (stretch + 1) * count // stretches
        known = [i for i in range(first, stop) if values[i] is not None]
        if known:
            kept.add(min(known, key=values.__getitem__))  # type: ignore[arg-type]
            kept.add(max(known, key=values.__getitem__))  # type: ignore[arg-type]
        if len(known) < stop - first:
            kept.add(next(i for i in range(first, stop) if values[i] is None))
        elif not {stop - 1} & kept:
            kept.add(stop - 1)
    return sorted(kept)


def curves(records: Iterable[Mapping[str, Any]], most: int = MOST_POINTS) -> dict[str, Any]:
    """Return all numbers of metrics.jsonl as thinned curves.

    Args:
        records: of metrics.jsonl, in its order.
        most: points to keep, of all curves together, or so.

    Returns:
        {"axis": {"step", "samples", "epoch", "time": lists of the same length}, "series":
        [{"split", "key", "step", "value"}]}: numbers of seven digits, None for gaps. Seconds of
        phases are added up over stretches of lines, so that their sums stay what they were.
    """
    axis: list[tuple[int, Any, Any, Any]] = []
    series: dict[tuple[str, str], tuple[list[int], list[float | None]]] = {}
    for record in records:
        step = record["step"]
        if not axis or step > axis[-1][0]:
            axis.append(
                (step, record.get("samples_seen"), record.get("epoch"), record.get(WALL_TIME))
            )
        split = str(record.get("split", "train"))
        plain = {key: value for key, value in record.items() if key != NONFINITE}
        for key, value in flat(plain).items():
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if key in _OF_THE_LINE or not (is_number or value is None):
                continue
            steps, values = series.setdefault((split, key.removeprefix("logged.")), ([], []))
            if steps and steps[-1] == step:
                values[-1] = value
            else:
                steps.append(step)
                values.append(value)
    each = min(_MOST, max(_FEWEST, most // max(len(series), 1)))
    return {
        "axis": _columns(axis, each),
        "series": [
            _series(split, key, steps, values, each)
            for (split, key), (steps, values) in series.items()
        ],
    }


def _columns(axis: Sequence[tuple[int, Any, Any, Any]], most: int) -> dict[str, list[Any]]:
    """Return the axis as columns; a line between two of its rows stands for those left out."""
    rows = axis
    if len(axis) > most:
        rows = [axis[i * (len(axis) - 1) // (most - 1)] for i in range(most)]
    names = ("step", "samples", "epoch", "time")
    return {name: [row[i] for row in rows] for i, name in enumerate(names)}


def _series(
    split: str, key: str, steps: Sequence[int], values: Sequence[float | None], most: int
) -> dict[str, Any]:
    if key.startswith(PHASES):
        steps, values = _added_up(steps, values)
    else:
        kept = thinned(values, most)
        steps, values = [steps[i] for i in kept], [values[i] for i in kept]
    return {"split": split, "key": key, "step": steps, "value": [_rounded(each) for each in values]}


def _added_up(
    steps: Sequence[int], values: Sequence[float | None]
) -> tuple[list[int], list[float | None]]:
    """Return the sums of a curve over stretches, each at its last step."""
    length = -(-len(steps) // _STRETCHES) or 1
    firsts = range(0, len(steps), length)
    ends = [steps[min(first + length, len(steps)) - 1] for first in firsts]
    return ends, [sum(filter(None, values[first : first + length])) for first in firsts]


def _rounded(value: float | None) -> float | None:
    return value if value is None or isinstance(value, int) else float(f"{value:.{_DIGITS}g}")
