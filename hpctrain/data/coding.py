"""How stored numbers stand for values, by the attributes of the CF conventions. No I/O.

The values are those of xarray. Numbers outside of a valid range are missing, as netCDF4-python has
it. Where the two differ about what is missing or unsigned, the stored number decides, as in
netCDF4-python.

Source: https://cfconventions.org, sections 2.5.1 and 8.1.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hpctrain.utils.json_files import checked
from hpctrain.utils.text import listed

Number = int | float
Bools = npt.NDArray[np.bool_]
ATTRIBUTES = (
    "_Unsigned",
    "_FillValue",
    "missing_value",
    "valid_range",
    "valid_min",
    "valid_max",
    "scale_factor",
    "add_offset",
)
"""What says how numbers are stored. `units` marks times, which are left as they are."""
MOST_NUMBERS = 64
"""Of one attribute: each number that stands for missing values is looked for in all values."""
_SHOWN = 100
_TIME_UNITS = re.compile(r"\s*\w+\s+since\s", re.IGNORECASE)


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


def coding_of(dtype: np.dtype[Any], attributes: Mapping[str, Any]) -> Coding:
    """Return how numbers of a dtype are decoded that have these attributes.

    Args:
        dtype: as stored.
        attributes: by name, as h5py returns them; others than ATTRIBUTES and units do not count.
    """
    said = {name: attributes[name] for name in ATTRIBUTES if name in attributes}
    if not said or dtype.kind not in "iuf":
        return PLAIN
    if _TIME_UNITS.match(_text(attributes.get("units")) or ""):
        return Coding(unused=(f"{', '.join(said)}: times are left as stored",))
    return _Reader(dtype.newbyteorder("="), said).coding()


def without_coding(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the attributes that hold for values too, once they are decoded."""
    return {name: value for name, value in attributes.items() if name not in ATTRIBUTES}


class _Reader:
    """Makes a Coding of attributes, and notes those that say nothing."""

    def __init__(self, dtype: np.dtype[Any], said: Mapping[str, Any]) -> None:
        self._said = said
        self._stored = dtype
        self._unused: list[str] = []
        self._problems: list[str] = []
        unsigned = self._unsigned()
        self._viewed = Coding(unsigned=unsigned).view(dtype)
        self._is_unsigned = None if self._viewed == dtype else unsigned

    def coding(self) -> Coding:
        missing = dict.fromkeys([*self._missing("_FillValue"), *self._missing("missing_value")])
        least, largest = self._range()
        scale, scale_dtype = self._factor("scale_factor")
        offset, offset_dtype = self._factor("add_offset")
        return Coding(
            unsigned=self._is_unsigned,
            missing=tuple(missing),
            least=least,
            largest=largest,
            scale=scale,
            offset=offset,
            is_single=self._is_single(
                scale_dtype, offset_dtype, says_nan=any(map(math.isnan, missing))
            ),
            unused=tuple(self._unused),
            problem="; ".join(self._problems),
        )

    def _unsigned(self) -> bool | None:
        if "_Unsigned" not in self._said:
            return None
        word = (_text(self._said["_Unsigned"]) or "").strip().lower()
        if word in ("true", "false") and self._stored.kind in "iu":
            return word == "true"
        if word != "false":
            self._note("_Unsigned", 'is "true" or "false", and for integers')
        return None

    def _missing(self, name: str) -> Iterator[Number]:
        for number in self._numbers(name):
            if math.isnan(number):
                if self._stored.kind == "f":
                    yield math.nan
                continue
            exact = self._storable(number)
            if exact is None:
                self._note(name, f"{number!r} does not fit {self._viewed}, so no value equals it")
            else:
                yield exact

    def _range(self) -> tuple[Number | None, Number | None]:
        both = self._bounds("valid_range", 2)
        if both is None:
            least, largest = self._bounds("valid_min", 1), self._bounds("valid_max", 1)
            both = [least[0] if least else None, largest[0] if largest else None]
        first, last = self._ends()
        return (None if both[0] == first else both[0]), (None if both[1] == last else both[1])

    def _ends(self) -> tuple[Number, Number]:
        """Return the least and the largest number there can be: as bounds they say nothing."""
        if self._viewed.kind == "f":
            return -math.inf, math.inf
        about = np.iinfo(self._viewed)
        return about.min, about.max

    def _bounds(self, name: str, count: int) -> list[Number | None] | None:
        """Return the bounds of an attribute, None for NaN; None: it does not say so many."""
        numbers = self._numbers(name)
        if not numbers:
            return None
        if len(numbers) != count:
            self._note(name, f"has {len(numbers)} numbers and not {count}")
            return None
        exact = [None if math.isnan(each) else self._exact(each, self._stored) for each in numbers]
        for number, each in zip(numbers, exact, strict=True):
            if each is None and not math.isnan(number):
                self._note(name, f"{number!r} does not fit {self._stored}")
                return None
        return [None if each is None else self._seen(each) for each in exact]

    def _factor(self, name: str) -> tuple[float | None, np.dtype[Any] | None]:
        if name not in self._said:
            return None, None
        given = np.ravel(np.asarray(self._said[name]))
        if given.dtype.kind not in "iuf" or given.size != 1 or not np.isfinite(given[0]):
            self._problems.append(f"{name} = {_shown(self._said[name])} is not one finite number")
            return None, None
        return float(given[0]), given.dtype.newbyteorder("=")

    def _is_single(
        self,
        scale: np.dtype[Any] | None,
        offset: np.dtype[Any] | None,
        *,
        says_nan: bool,
    ) -> bool:
        """Tell whether xarray would compute in float32."""
        single = np.dtype(np.float32)
        if self._viewed == np.dtype(np.float64) and says_nan:
            return False  # where NaN is said to be missing, xarray keeps the dtype of floats
        if offset is None:
            return scale == single
        wide = self._viewed.kind in "iu" and self._viewed.itemsize == 4
        return scale == offset == single and not wide

    def _numbers(self, name: str) -> list[Number]:
        if name not in self._said:
            return []
        given = np.ravel(np.asarray(self._said[name]))
        if given.dtype.kind not in "iuf":
            if _text(self._said[name]):
                self._note(name, f"{_shown(self._said[name])} is not a number")
            return []
        if given.size > MOST_NUMBERS:
            self._problems.append(f"{name} has {given.size:,} numbers, at most {MOST_NUMBERS}")
            return []
        numbers: list[Number] = given.tolist()
        return numbers

    def _storable(self, number: Number) -> Number | None:
        """Return a number as it is seen, if it can be stored in either reading of the bits."""
        exact = self._exact(number, self._stored)
        return self._exact(number, self._viewed) if exact is None else self._seen(exact)

    def _seen(self, number: Number) -> Number:
        """Return a number that is stored as it reads once `_Unsigned` is followed."""
        seen: Number = np.array(number, self._stored).view(self._viewed).item()
        return seen

    def _exact(self, number: Number, dtype: np.dtype[Any]) -> Number | None:
        """Return a number as a dtype holds it, None if that would be another one."""
        if dtype.kind == "f":
            with np.errstate(over="ignore"):
                cast = float(dtype.type(number))
            return cast if cast == number else None
        bounds = np.iinfo(dtype)
        if not bounds.min <= number <= bounds.max or number != int(number):
            return None
        return int(number)

    def _note(self, name: str, why: str) -> None:
        self._unused.append(f"{name}: {why}")


def _text(value: Any) -> str | None:
    """Return an attribute that is text, in whichever of HDF5's forms."""
    if value is None:
        return None
    flat = np.ravel(np.asarray(value, dtype=object))
    if len(flat) != 1 or not isinstance(flat[0], str | bytes):
        return None
    return flat[0].decode(errors="replace") if isinstance(flat[0], bytes) else str(flat[0])


def _shown(value: Any) -> str:
    text = _text(value)
    if text is not None:
        return repr(text[:_SHOWN])
    given = np.asarray(value)
    return str(given.tolist()) if given.size <= MOST_NUMBERS else f"{given.size:,} values"
