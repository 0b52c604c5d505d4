"""What codings say of numbers on a device: one value for all of them, or one for each."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hpctrain.data.coding import Coding, Number

Value = Number | Tensor
"""One for all numbers, or one for each, fit to be broadcast to them."""

_SIGN = 2**63
"""Between the order of 64-bit integers without a sign, and that of the same bits with one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CodingTable:
    """What codings say of numbers: one value for all, or tables of one a coding.

    Attributes:
        missing: numbers that stand for none, and which codings have so many; None: all.
        least: where bounds are tables, those that are not said are the widest.
        largest: the same.
        scale: where it is a table, 1 where not said.
        offset: where it is a table, 0 where not said.
        rounds: which codings round every result to float32, where not all compute in that.
    """

    missing: tuple[tuple[Value, Tensor | None], ...] = ()
    least: Value | None = None
    largest: Value | None = None
    scale: Value | None = None
    offset: Value | None = None
    rounds: Tensor | None = None

    @classmethod
    def of(
        cls,
        codings: Sequence[Coding],
        viewed: np.dtype[Any],
        working: torch.dtype,
        device: torch.device,
    ) -> CodingTable:
        """Return what codings say, as tables if they are several."""
        shift = _SIGN if viewed == np.dtype(np.uint64) else 0
        marks = [[each - shift for each in c.missing if not math.isnan(each)] for c in codings]
        least = [None if c.least is None else c.least - shift for c in codings]
        largest = [None if c.largest is None else c.largest - shift for c in codings]
        if len(codings) == 1:
            return cls(
                missing=tuple((number, None) for number in marks[0]),
                least=least[0],
                largest=largest[0],
                scale=codings[0].scale,
                offset=codings[0].offset,
            )

        def table(values: Sequence[Number | None], default: Number, dtype: torch.dtype) -> Any:
            if all(value is None for value in values):
                return None
            known = [default if value is None else value for value in values]
            return torch.tensor(known, dtype=dtype, device=device)

        seen = seen_dtype(viewed)
        low, high = _widest(seen)
        missing = []
        for place in range(max(map(len, marks))):
            nth = [each[place] if place < len(each) else None for each in marks]
            has = torch.tensor([each is not None for each in nth], device=device)
            missing.append((table(nth, 0, seen), None if bool(has.all()) else has))
        single = [c.working_dtype(viewed) == np.dtype(np.float32) for c in codings]
        rounds = working == torch.float64 and any(single)
        return cls(
            missing=tuple(missing),
            least=table(least, low, seen),
            largest=table(largest, high, seen),
            scale=table([c.scale for c in codings], 1.0, working),
            offset=table([c.offset for c in codings], 0.0, working),
            rounds=torch.tensor(single, device=device) if rounds else None,
        )

    def at(self, codes: Tensor, axes: int) -> CodingTable:
        """Return what is said of numbers of these codings.

        Args:
            codes: (samples,) or (samples, steps).
            axes: of the numbers, those of the codes first.
        """
        shape = (*codes.shape, *[1] * (axes - codes.ndim))

        def chosen(value: Any) -> Any:
            return value[codes].view(shape) if isinstance(value, Tensor) else value

        return CodingTable(
            missing=tuple((chosen(number), chosen(has)) for number, has in self.missing),
            **{
                each.name: chosen(getattr(self, each.name))
                for each in dataclasses.fields(self)
                if each.name != "missing"
            },
        )

    def missing_among(self, seen: Tensor) -> Tensor | None:
        """Return where numbers stand for none; None: nothing says so."""
        found: Tensor | None = None
        for number, has in self.missing:
            own = seen == number if has is None else (seen == number) & has
            found = own if found is None else found.logical_or_(own)
        if self.least is not None:
            own = seen < self.least
            found = own if found is None else found.logical_or_(own)
        if self.largest is not None:
            own = seen > self.largest
            found = own if found is None else found.logical_or_(own)
        return found

    def compute(self, values: Tensor) -> Tensor:
        """Return values scaled and moved, in place; each result rounded as xarray does."""
        if self.scale is not None:
            values = self._rounded(values).mul_(self.scale)
        if self.offset is not None:
            values = self._rounded(values).add_(self.offset)
        return self._rounded(values)

    def _rounded(self, values: Tensor) -> Tensor:
        if self.rounds is None:
            return values
        return torch.where(self.rounds, values.float().double(), values)


def torch_dtype_of(dtype: np.dtype[Any]) -> torch.dtype:
    """Return torch's dtype of the same name."""
    found = getattr(torch, dtype.name)
    assert isinstance(found, torch.dtype)
    return found


def seen_dtype(viewed: np.dtype[Any]) -> torch.dtype:
    """Return a dtype that holds the numbers of another, and that torch has all functions for."""
    wider = {"uint16": torch.int32, "uint32": torch.int64, "uint64": torch.int64}
    return wider.get(viewed.name) or torch_dtype_of(viewed)


def seen_numbers(numbers: Tensor, viewed: np.dtype[Any]) -> Tensor:
    """Return numbers in `seen_dtype`; those of uint64 less 2^63, which keeps their order."""
    if viewed.kind == "f":
        return numbers
    if viewed.kind == "i" or viewed.itemsize == 1:
        return numbers.view(torch_dtype_of(viewed))
    if viewed.itemsize == 8:
        return numbers.view(torch.int64).bitwise_xor(-_SIGN)
    bits = 8 * viewed.itemsize
    signed: torch.dtype = getattr(torch, f"int{bits}")
    return numbers.view(signed).to(seen_dtype(viewed)).bitwise_and_(2**bits - 1)


def _widest(dtype: torch.dtype) -> tuple[Number, Number]:
    if dtype.is_floating_point:
        return -torch.inf, torch.inf
    about = torch.iinfo(dtype)
    return about.min, about.max
