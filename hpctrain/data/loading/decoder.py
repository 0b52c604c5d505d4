"""Decodes batches on the device, bit for bit as `hpctrain.data.decoding` does on the host.

The wire carries integers as stored. Where the files of a dataset differ, each row carries which of
their codings it has, and the numbers of all are looked up at once.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hpctrain.data.arrays import Int64s
from hpctrain.data.coding import Coding, Number
from hpctrain.data.decoding import FieldDecoding
from hpctrain.data.loading.batch_transform import Constants, Missing
from hpctrain.errors import ConfigError

Value = Number | Tensor
"""One for all numbers, or one for each, fit to be broadcast to them."""

_SIGN = 2**63
"""Between the order of 64-bit integers without a sign, and that of the same bits with one."""
PART_VALUES = 2**16
"""Decoded at once by a CPU. Of int16, 240 million values a second and core; in one go, 97."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoding:
    """What is decoded of a dataset, and where.

    Attributes:
        on_host: fields that are decoded before a transform of samples sees them.
        on_device: the others, and what marks the missing integers.
        refused: integers of which none may be missing: they would be taken for others.
        constants: fields that are the same for every sample, as the task sees them.
    """

    on_host: Mapping[str, FieldDecoding] = field(default_factory=dict)
    on_device: Decoder = field(default_factory=lambda: Decoder({}, {}, torch.device("cpu")))
    refused: Sequence[FieldDecoding] = ()
    constants: Constants = field(default_factory=Constants)

    @property
    def all(self) -> dict[str, FieldDecoding]:
        """Every field that is decoded, wherever."""
        return {**self.on_device.decodings, **self.on_host}

    @property
    def needs_samples(self) -> bool:
        """Whether it has to be known which samples a batch holds."""
        return self.on_device.needs_samples or bool(self.on_host or self.refused)


class Decoder:
    """Decodes fields of batches.

    Attributes:
        decodings: of the fields.
        needs_samples: whether it has to know which samples a batch holds.
    """

    def __init__(
        self,
        decodings: Mapping[str, FieldDecoding],
        missing: Mapping[str, Missing],
        device: torch.device,
    ) -> None:
        """Put what the files say on the device.

        Args:
            decodings: of the fields.
            missing: what is made of missing values; of floats that is for `BatchTransform`.
            device: where batches are.

        Raises:
            ConfigError: if integers are to be filled with another kind of number.
        """
        self.decodings = decodings
        self._fields = {
            name: _FieldDecoder(each, missing.get(name, Missing()), device)
            for name, each in decodings.items()
        }
        self.needs_samples = any(len(each.codings) > 1 for each in decodings.values())

    def codes(self, samples: Int64s | None) -> dict[str, Tensor]:
        """Return, of fields whose files differ, which coding each row of samples has.

        Returns:
            By field, (samples,) or (samples, steps) int64, on the host.
        """
        if samples is None or not self.needs_samples:
            return {}
        found = {name: each.decoding.codes(samples) for name, each in self._fields.items()}
        return {name: torch.from_numpy(codes) for name, codes in found.items() if codes is not None}

    def apply(self, fields: dict[str, Tensor], codes: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the fields decoded, with masks of integers.

        Args:
            fields: by name, (samples, *shape) on the device; they may be changed.
            codes: of the same samples, as `codes` returns them, on the device.
        """
        if not self._fields:
            return fields
        decoded = dict(fields)
        for name, each in self._fields.items():
            decoded |= each.apply(fields[name], codes.get(name))
        return decoded


def _parts(rows: int, values: int) -> Iterator[tuple[slice, slice]]:
    """Cut (rows, values) into parts of about PART_VALUES: several rows, or pieces of one."""
    width = min(values, PART_VALUES)
    height = max(1, PART_VALUES // width)
    for row in range(0, rows, height):
        for value in range(0, values, width):
            yield slice(row, row + height), slice(value, value + width)


class _FieldDecoder:
    """Decodes one field."""

    def __init__(self, decoding: FieldDecoding, missing: Missing, device: torch.device) -> None:
        self.decoding = decoding
        self._missing = missing
        self._viewed = decoding.viewed
        self._decoded = torch_dtype_of(decoding.decoded)
        kinds = [each.working_dtype(decoding.viewed) for each in decoding.codings]
        self._working = torch_dtype_of(max(kinds, key=lambda kind: kind.itemsize))
        # Apple's devices have no float64.
        is_short = device.type == "mps" and self._working == torch.float64
        self._device = torch.device("cpu") if is_short else device
        self._said = CodingTable.of(decoding.codings, decoding.viewed, self._working, self._device)
        self._fill = None if missing.fill is None else self._stored_fill(missing.fill)

    def apply(self, numbers: Tensor, codes: Tensor | None) -> dict[str, Tensor]:
        """Return the field decoded, and its mask if it is of integers and wanted."""
        if self._device.type == numbers.device.type:
            return self._apply(numbers, codes)
        here = None if codes is None else codes.to(self._device)
        found = self._apply(numbers.to(self._device), here)
        return {name: value.to(numbers.device) for name, value in found.items()}

    def _apply(self, numbers: Tensor, codes: Tensor | None) -> dict[str, Tensor]:
        name = self.decoding.name
        if not self.decoding.keeps_numbers:
            return {name: self._floats(numbers, codes)}
        said = self._said if codes is None else self._said.at(codes, numbers.ndim)
        return self._integers(name, numbers, seen_numbers(numbers, self._viewed), said)

    def _floats(self, numbers: Tensor, codes: Tensor | None) -> Tensor:
        """Return the values of a batch, on the CPU a part at a time that stays in its cache."""
        made = torch.empty(numbers.shape, dtype=self._decoded, device=numbers.device)
        if not numbers.numel():
            return made
        rows = 1 if codes is None else codes.numel()
        flat, of_row = numbers.reshape(rows, -1), None if codes is None else codes.flatten()
        if numbers.device.type != "cpu":
            return self._values(flat, of_row).view(numbers.shape)
        into = made.view(rows, -1)
        for part in _parts(*flat.shape):
            into[part] = self._values(flat[part], None if of_row is None else of_row[part[0]])
        return made

    def _values(self, numbers: Tensor, codes: Tensor | None) -> Tensor:
        """Return the values of numbers, (rows, any), of rows that have these codings."""
        said = self._said if codes is None else self._said.at(codes, numbers.ndim)
        seen = seen_numbers(numbers, self._viewed)
        missing = said.missing_among(seen)
        if self._viewed == np.dtype(np.uint64):
            seen = numbers.view(torch.uint64)
        values = said.compute(seen.to(self._working))
        if missing is not None:
            values.masked_fill_(missing, torch.nan)
        return values.to(self._decoded)

    def _integers(
        self, name: str, numbers: Tensor, seen: Tensor, said: CodingTable
    ) -> dict[str, Tensor]:
        made = {name: numbers.view(self._decoded)}
        if self._missing == Missing():
            return made
        missing = said.missing_among(seen)
        if missing is None:
            missing = torch.zeros(numbers.shape, dtype=torch.bool, device=numbers.device)
        if self._fill is not None:
            # As signed ones: torch has few functions for others of more than a byte.
            signed = getattr(torch, f"int{8 * self._viewed.itemsize}")
            made[name] = torch.where(missing, self._fill, numbers.view(signed)).view(self._decoded)
        if self._missing.mask is not None:
            made[self._missing.mask] = (~missing).to(torch.float32)
        return made

    def _stored_fill(self, fill: float) -> int | None:
        """Return the fill of integers, as the same bits read with a sign."""
        if not self.decoding.keeps_numbers:
            return None
        about = np.iinfo(self._viewed)
        if fill != int(fill) or not about.min <= fill <= about.max:
            raise ConfigError(
                f"data.fields.{self.decoding.name}.fill = {fill:g}: the field stays "
                f"{self._viewed.name}, which has no such number"
            )
        stored: int = np.array(int(fill), self._viewed).view(f"i{about.bits // 8}").item()
        return stored


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
