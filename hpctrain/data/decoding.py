"""From the numbers of a dataset's files to values: which fields, to which dtype. On the host."""

from __future__ import annotations

import json
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from hpctrain.data.coding import Bools, Coding
from hpctrain.data.dataset import Dataset, Field
from hpctrain.errors import DatasetError

Numbers = npt.NDArray[Any]
Codes = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class FieldDecoding:
    """How the numbers of a field become values.

    Attributes:
        dataset: that has the field, a view as well.
        name: of the field.
        viewed: dtype of the numbers once `_Unsigned` is followed, in this machine's byte order.
        decoded: of the values: floats, or `viewed`.
        codings: the different ones of its files.
        of_shard: (shards of the field's home,) which of them each file has.
    """

    dataset: Dataset
    name: str
    viewed: np.dtype[Any]
    decoded: np.dtype[Any]
    codings: tuple[Coding, ...]
    of_shard: Codes

    @property
    def keeps_numbers(self) -> bool:
        """Whether integers stay what they are; what is missing among them is still marked."""
        return self.decoded.kind in "iu"

    @property
    def marks(self) -> bool:
        """Whether numbers can stand for none."""
        return any(each.marks for each in self.codings)

    @property
    def field(self) -> Field:
        """The field as it is once decoded."""
        return Field(self.dataset.fields[self.name].shape, self.decoded)

    def codes(self, samples: npt.NDArray[np.int64]) -> Codes | None:
        """Return which of the codings the rows of samples have, None if there is but one.

        Returns:
            (samples,), or (samples, steps) where a sample holds several rows.
        """
        if len(self.codings) == 1:
            return None
        found: Codes = self.of_shard[self.dataset.shards_of(self.name, samples)]
        return found

    def decode(self, numbers: Numbers, codes: Codes | None = None) -> Numbers:
        """Return the values of numbers.

        Args:
            numbers: (samples, *shape), as stored but in this machine's byte order.
            codes: of the samples.
        """
        seen = numbers.view(self.viewed)
        if self.keeps_numbers:
            return seen
        return self._by_coding(seen, codes, lambda c, n: c.decode(n, self.decoded), self.decoded)

    def missing(self, numbers: Numbers, codes: Codes | None = None) -> Bools:
        """Return which numbers stand for none by what their files say, NaN included if it is said.

        Args:
            numbers: as `decode` takes them.
            codes: of the samples.
        """
        return self._by_coding(numbers.view(self.viewed), codes, _missing, np.dtype(np.bool_))

    def _by_coding(
        self,
        seen: Numbers,
        codes: Codes | None,
        make: Callable[[Coding, Numbers], Numbers],
        dtype: np.dtype[Any],
    ) -> Numbers:
        if codes is None:
            return make(self.codings[0], seen)
        made = np.empty(seen.shape, dtype)
        for code in np.unique(codes):
            own = codes == code
            made[own] = make(self.codings[code], seen[own])
        return made


def decoded_rows(
    arrays: Mapping[str, Numbers],
    samples: npt.NDArray[np.int64],
    decodings: Mapping[str, FieldDecoding],
) -> dict[str, Numbers]:
    """Return the values of samples.

    Args:
        arrays: by field, (samples, *shape) as stored but in this machine's byte order.
        samples: which they are.
        decodings: of the fields to decode.
    """
    return {
        name: numbers
        if (decoding := decodings.get(name)) is None
        else decoding.decode(numbers, decoding.codes(samples))
        for name, numbers in arrays.items()
    }


def decodings(
    datasets: Sequence[Dataset], integers: Container[str] = ()
) -> list[dict[str, FieldDecoding]]:
    """Return, for each of the datasets of a run, the fields that are to be decoded.

    A field gets the same kind of values in all of them, whichever of their files say something.

    Args:
        datasets: with the same fields.
        integers: fields that stay integers where their numbers stand for themselves or for none.

    Raises:
        DatasetError: if the attributes of a file cannot be followed, or do not go together.
    """
    found: list[dict[str, FieldDecoding]] = [{} for _ in datasets]
    for name in datasets[0].fields:
        codings = [each for dataset in datasets for each in dataset.codings(name)]
        if all(each.is_plain for each in codings):
            continue
        keeps = name in integers and not any(each.is_scaled for each in codings)
        keeps &= datasets[0].fields[name].dtype.kind in "iu"
        keeps |= not any(each.makes_floats for each in codings)
        for decoded, dataset in zip(found, datasets, strict=True):
            decoded[name] = _decoding(dataset, name, keeps_integers=keeps)
    return found


def described(decoding: FieldDecoding) -> str:
    """Return in a few words what becomes of the numbers of a field."""
    stored = decoding.dataset.fields[decoding.name].dtype.name
    words = [stored if stored == decoding.viewed.name else f"{stored} as {decoding.viewed.name}"]
    for sign, values in (
        ("x", [each.scale for each in decoding.codings]),
        ("+", [each.offset for each in decoding.codings]),
    ):
        known = [value for value in values if value is not None]
        if known:
            words.append(f"{sign} {_span(known)}")
    said = " ".join(words)
    if len(words) > 1 or decoding.decoded.name != stored:
        said += f" = {decoding.decoded.name}"
    marks = [_marks(each) for each in decoding.codings if each.marks]
    if marks:
        said += f", missing: {marks[0]}" + (" and others" if len(set(marks)) > 1 else "")
    return said + (" (each file has its own)" if len(decoding.codings) > 1 else "")


def unused_attributes(dataset: Dataset) -> list[str]:
    """Return what is said of fields that says nothing of their numbers, each once."""
    found: dict[str, str] = {}
    for name in dataset.fields:
        home, _ = dataset.home(name)
        for shard, coding in zip(home.shards, dataset.codings(name), strict=True):
            for each in coding.unused:
                found.setdefault(f"{name}: {each}", shard.name)
    return [f"{what} (in {file})" for what, file in found.items()]


def decoding_record(dataset: Dataset, name: str) -> str:
    """Return a hash of how the files say that a field is decoded; "" if nothing is to be done.

    Statistics and the state of a run keep it: the same numbers are other values under another one.
    """
    codings = dataset.codings(name)
    if all(each.is_plain for each in codings):
        return ""
    facts = [{k: v for k, v in each.to_json().items() if k != "unused"} for each in codings]
    # By file: in another order of them each is decoded as before.
    names = [shard.name for shard in dataset.home(name)[0].shards]
    of_file = sorted(zip(names, (json.dumps(each, sort_keys=True) for each in facts), strict=True))
    return str(xxhash.xxh3_64_hexdigest(json.dumps(of_file).encode()))


def _decoding(dataset: Dataset, name: str, *, keeps_integers: bool) -> FieldDecoding:
    home, inside = dataset.home(name)
    codings = dataset.codings(name)
    stored = dataset.fields[name].dtype.newbyteorder("=")
    for shard, coding in zip(home.shards, codings, strict=True):
        if coding.problem:
            raise DatasetError(
                f'{shard.path}: field "{inside}": {coding.problem}, so its numbers cannot be '
                'decoded. Correct the attribute, or take what is stored: decode = "none" in [data] '
                f"or [data.fields.{name}], --stored for tools"
            )
        if coding.view(stored) != codings[0].view(stored):
            raise DatasetError(
                f'{shard.path}: field "{inside}" is {coding.view(stored)} by its _Unsigned, but '
                f"{codings[0].view(stored)} in {home.shards[0].path}: give a pattern of files that "
                "fit together"
            )
    viewed = codings[0].view(stored)
    different = tuple(dict.fromkeys(codings))
    number = {coding: i for i, coding in enumerate(different)}
    return FieldDecoding(
        dataset=dataset,
        name=name,
        viewed=viewed,
        decoded=viewed if keeps_integers else decoded_dtype(viewed, codings),
        codings=different,
        of_shard=np.array([number[coding] for coding in codings], np.int64),
    )


def decoded_dtype(viewed: np.dtype[Any], codings: Sequence[Coding]) -> np.dtype[Any]:
    """Return the dtype of values: float64 where the numbers are that, else at most float32.

    Args:
        viewed: of the numbers, `_Unsigned` followed.
        codings: of all files.
    """
    is_packed = any(each.scale is not None or each.offset is not None for each in codings)
    if viewed.kind == "f" and (viewed.itemsize == 8 or not is_packed):
        return viewed
    return np.dtype(np.float32)


def _missing(coding: Coding, numbers: Numbers) -> Bools:
    found = coding.is_missing(numbers)
    if found is None:
        found = np.zeros(numbers.shape, np.bool_)
    if coding.says_nan and numbers.dtype.kind == "f":
        found |= np.isnan(numbers)
    return found


def _span(values: Sequence[float]) -> str:
    least, largest = min(values), max(values)
    return f"{least:g}" if least == largest else f"{least:g} to {largest:g}"


def _marks(coding: Coding) -> str:
    marks = [f"{number:g}" for number in coding.missing]
    if coding.least is not None:
        marks.append(f"below {coding.least:g}")
    if coding.largest is not None:
        marks.append(f"above {coding.largest:g}")
    return ", ".join(marks)
