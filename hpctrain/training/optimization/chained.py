"""One schedule after the other."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hpctrain.config.registry import bind, resolve, unknown_name
from hpctrain.config.schema import ComponentSection
from hpctrain.errors import ConfigError
from hpctrain.training.optimization.schedules import Factor


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    factor: Factor
    arguments: Mapping[str, Any]
    until: float | None


class Chained:
    """Schedules in turn, each from where the one before has ended.

    Every part counts from its own beginning to its own end, and its factors are of what the parts
    before have left: "constant", then "cosine" with final = 0.5, then "linear" ends at 0.
    """

    def __init__(self, parts: Sequence[Mapping[str, Any]]) -> None:
        """Find the parts.

        Args:
            parts: tables `[[scheduler.parts]]` with `use`, the arguments of that schedule, and
                `until`: where the part ends, counted from the end of the warm-up in the unit of
                the schedule. The last one ends with the run and has no `until`.

        Raises:
            ConfigError: if a part cannot be found, refuses its arguments, or has no right end.
        """
        if not isinstance(parts, list) or not parts:
            raise ConfigError("scheduler.parts: expected tables [[scheduler.parts]], at least one")
        self._parts = [
            _part(number, part, last=number == len(parts))
            for number, part in enumerate(parts, start=1)
        ]
        ends = [part.until for part in self._parts if part.until is not None]
        if any(after <= before for before, after in zip([0.0, *ends], ends, strict=False)):
            raise ConfigError(f"scheduler.parts: until = {ends}: expected rising numbers above 0")

    def __call__(self, step: float, total_steps: float) -> float:
        """Return the factor of `optimizer.lr`."""
        value, begin = 1.0, 0.0
        for part in self._parts:
            end = total_steps if part.until is None else part.until
            inside = part.until is None or step < end
            done = step - begin if inside else end - begin
            value *= part.factor(done, max(0.0, end - begin), **part.arguments)
            if inside:
                break
            begin = end
        return value


def _part(number: int, part: Mapping[str, Any], *, last: bool) -> _Part:
    where = f"[[scheduler.parts]], the {number}. of them"
    if not isinstance(part, Mapping) or not isinstance(part.get("use"), str):
        raise ConfigError(f'{where}: `use` is missing, such as use = "cosine"')
    arguments = {key: value for key, value in part.items() if key not in ("use", "until")}
    use, until = part["use"], part.get("until")
    if last != (until is None):
        wrong = "the last one ends with the run, without `until`" if last else "`until` is missing"
        raise ConfigError(f"{where}: {wrong}")
    if until is not None and (isinstance(until, bool) or not isinstance(until, int | float)):
        raise ConfigError(f"{where}: until = {until!r}: expected a number")
    if (problem := unknown_name("scheduler", use)) is not None:
        raise ConfigError(f'{where}: use = "{use}": {problem}')
    component = ComponentSection(use=use, arguments=arguments)
    factor = resolve("scheduler", component)
    if inspect.isclass(factor):
        raise ConfigError(f'{where}: use = "{use}" has a state of its own and stands alone only')
    mistakes = bind("scheduler", component, factor, given=("step", "total_steps"))
    if mistakes:
        raise ConfigError(f"{where}: {'; '.join(map(str, mistakes))}")
    return _Part(factor=factor, arguments=arguments, until=until)
