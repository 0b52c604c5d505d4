"""From the attributes of the CF conventions to a Coding. No I/O.

The values are those of xarray. Numbers outside of a valid range are missing, as netCDF4-python has
it. Where the two differ about what is missing or unsigned, the stored number decides, as in
netCDF4-python.

Source: https://cfconventions.org, sections 2.5.1 and 8.1.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from hpctrain.data.coding import PLAIN, Coding, Number

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
"""What says how numbers are stored. `units` tells times, which are left as they are."""

MOST_NUMBERS = 64
"""Of one attribute: each number that stands for missing values is looked for in all values."""
_SHOWN = 100
_TIME_UNITS = re.compile(r"\s*\w+\s+since\s", re.IGNORECASE)


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
                self._note(name, f"{number!r} is no {self._viewed}, so no value equals it")
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
                self._note(name, f"{number!r} is no {self._stored}")
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
                self._note(name, f"{_shown(self._said[name])} is no number")
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
