"""How stored numbers stand for values, as `hpctrain.data.conventions` reads it of attributes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hpctrain.utils.json_files import checked
from hpctrain.utils.text import listed

Number = int | float
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class Coding:
    """How the stored numbers of a field in one file stand for values.

    Attributes:
        unsigned: read integers as unsigned ones, or as signed ones; None: as they are.
        missing: numbers that stand for none. These and the bounds are such as can be stored,
            `unsigned` followed.
        least: below it a number stands for none.
        largest: and above it.
        scale: that numbers are multiplied with.
        offset: that is added then.
        is_single: computed in float32, as xarray does where the attributes are that.
        unused: attributes that say nothing of numbers like these, and why.
        problem: why the numbers cannot be decoded; empty if they can.
    """

    unsigned: bool | None = None
    missing: tuple[Number, ...] = ()
    least: Number | None = None
    largest: Number | None = None
    scale: float | None = None
    offset: float | None = None
    is_single: bool = False
    unused: tuple[str, ...] = ()
    problem: str = ""

    @property
    def is_scaled(self) -> bool:
        """Whether a number stands for another one."""
        return self.scale not in (None, 1.0) or self.offset not in (None, 0.0)

    @property
    def marks(self) -> bool:
        """Whether numbers can stand for none; that NaN does so needs no saying."""
        return self.is_bounded or any(not math.isnan(number) for number in self.missing)

    def marks_others_than(self, number: object) -> bool:
        """Tell whether another number than this one can stand for none."""
        return self.marks and (set(self.missing) != {number} or self.is_bounded)

    @property
    def is_bounded(self) -> bool:
        """Whether numbers outside of a range stand for none."""
        return self.least is not None or self.largest is not None

    @property
    def says_nan(self) -> bool:
        """Whether NaN is said to stand for none, and is no damage."""
        return any(math.isnan(number) for number in self.missing)

    @property
    def makes_floats(self) -> bool:
        """Whether integers become floats, as there are others between them, or NaN."""
        return self.scale is not None or self.offset is not None or self.marks

    @property
    def is_plain(self) -> bool:
        """Whether every number stands for itself."""
        return not (self.makes_floats or self.unsigned is not None or self.problem)

    def view(self, dtype: np.dtype[Any]) -> np.dtype[Any]:
        """Return the dtype that stored numbers have once `unsigned` is followed."""
        if self.unsigned is not None and dtype.kind == ("i" if self.unsigned else "u"):
            return np.dtype(f"{dtype.byteorder}{'u' if self.unsigned else 'i'}{dtype.itemsize}")
        return dtype

    def is_missing(self, numbers: npt.NDArray[Any]) -> Bools | None:
        """Return where numbers, `unsigned` followed, stand for none; None: nothing says so."""
        found: Bools | None = None
        for each in self._tests(numbers):
            found = each if found is None else np.logical_or(found, each, out=found)
        return found

    def decode(self, numbers: npt.NDArray[Any], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        """Return the values of stored numbers, `unsigned` followed, as floats; NaN where missing.

        Args:
            numbers: of any shape, in this machine's byte order.
            dtype: to round them to in the end.
        """
        missing = self.is_missing(numbers)
        values = numbers.astype(self.working_dtype(numbers.dtype))
        if self.scale is not None:
            values *= values.dtype.type(self.scale)
        if self.offset is not None:
            values += values.dtype.type(self.offset)
        if missing is not None:
            values[missing] = np.nan
        return values.astype(dtype, copy=False)

    def working_dtype(self, numbers: np.dtype[Any]) -> np.dtype[Any]:
        """Return the dtype in which numbers of a dtype are computed with."""
        if self.scale is None and self.offset is None:
            if numbers.kind == "f":
                return numbers
            return np.dtype(np.float32 if numbers.itemsize <= 2 else np.float64)
        return np.dtype(np.float32 if self.is_single else np.float64)

    def to_json(self) -> dict[str, Any]:
        """Return what is said, as JSON; `coding_from` reads it."""
        return {
            key: _json(value)
            for each in dataclasses.fields(self)
            if (value := getattr(self, key := each.name)) != each.default
        }

    def _tests(self, numbers: npt.NDArray[Any]) -> Iterator[Bools]:
        for number in self.missing:
            if not math.isnan(number):
                yield numbers == number
        if self.least is not None:
            yield numbers < self.least
        if self.largest is not None:
            yield numbers > self.largest


PLAIN = Coding()


def without_plain(codings: Mapping[str, Coding]) -> dict[str, Coding]:
    """Return the codings, by field, that say anything at all."""
    return {name: coding for name, coding in codings.items() if coding != PLAIN}


def coding_from(document: Mapping[str, Any]) -> Coding:
    """Return what `Coding.to_json` has written.

    Raises:
        ValueError: if it is something else.
    """
    if unknown := sorted(set(document) - {each.name for each in dataclasses.fields(Coding)}):
        raise ValueError(f"unknown: {listed(unknown)}")
    if empty := sorted(key for key, value in document.items() if value is None):
        raise ValueError(f"without a value: {listed(empty)}")
    kept = dict(document)
    for key in ("least", "largest", "scale", "offset"):
        if key in kept:
            kept[key] = _number(kept[key])
    if isinstance(kept.get("missing"), list):
        kept["missing"] = [_number(each) for each in kept["missing"]]
    coding = checked(kept, Coding)
    # One NaN is not equal to another, but the same object is, in the comparison of codings.
    missing = tuple(math.nan if math.isnan(each) else each for each in coding.missing)
    return dataclasses.replace(coding, missing=missing)


def _json(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_json(each) for each in value]
    # JSON has no such numbers.
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _number(value: Any) -> Any:
    return float(value) if isinstance(value, str) else value
