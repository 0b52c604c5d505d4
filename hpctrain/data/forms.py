"""What becomes of a stored row before anybody sees it: members, selections, classes, bytes. No I/O.

Readers apply it, so that training, evaluation, caches and tools all meet the field as delivered.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hpctrain.utils.text import listed

Rows = npt.NDArray[Any]
Pick = tuple[int, ...] | None
"""Indices that are taken of an axis; None: all."""
BYTES = "bytes"
_OR_MISSING = (
    ": name it, or say what stands for such values: a mask, or missing = -100 that is "
    "task.ignore_index as well"
)
_TEXT = re.compile(r"S([1-9]\d{0,6})")
COMPLEX_PAIRS = (("r", "i"), ("real", "imag"))
"""Members of compound types that stand for complex numbers: h5py's, and MATLAB's."""


class UnfitRowError(Exception):
    """A value that cannot be what is asked for.

    Attributes:
        row: of those that were given.
    """

    def __init__(self, row: int, problem: str) -> None:
        super().__init__(problem)
        self.row = row


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What the user says of a field as it is stored.

    Attributes:
        path: of the HDF5 dataset, perhaps with members of its compound type behind it.
        dtype: number format to deliver, "bytes", or "S20" for 20 bytes of each text.
        squeeze: leave axes of length 1 out.
        select: by axis of a sample, or the name of its coordinate: indices, a slice, or values.
        nearest: take what is nearest to a value of a coordinate, not only what is equal.
        classes: what texts or names of an enumeration stand for 0, 1, 2 and so on.
        missing: number of what is none of the classes, and of NaN among whole numbers; None: such
            a row is refused.
        sequence: take rows of variable length, numbers or the bytes of texts, as they are.
    """

    path: str
    dtype: str | None = None
    squeeze: bool = False
    select: tuple[tuple[str, Any], ...] = ()
    nearest: bool = False
    classes: tuple[str, ...] | None = None
    missing: int | None = None
    sequence: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether rows are delivered as they are stored, but for members."""
        return self == Wish(path=self.path)


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """How a stored row of a field becomes the one that is delivered.

    Attributes:
        path: of the HDF5 dataset.
        shape: of a row as it is stored.
        stored: dtype of its values, without what only h5py knows of it.
        members: of compound types, from the outermost on.
        picks: for each axis of the row, members' own ones behind; () is all of all.
        squeeze: leave axes of length 1 out.
        dtype: as in Wish.
        classes: as in Wish.
        missing: as in Wish.
        codes: of an enumeration, the number of each class.
        sequence: a row is of variable length, and `shape` and `stored` are those of its values.
        whole: how bytes that numpy has no type for make a whole number, such as "<i3" for signed
            ones of three bytes, the least first; empty: they make none.
    """

    path: str
    shape: tuple[int, ...]
    stored: np.dtype[Any]
    members: tuple[str, ...] = ()
    picks: tuple[Pick, ...] = ()
    squeeze: bool = False
    dtype: str | None = None
    classes: tuple[str, ...] | None = None
    missing: int | None = None
    codes: tuple[int, ...] | None = None
    sequence: bool = False
    whole: str = ""

    @property
    def is_direct(self) -> bool:
        """Whether readers of bytes may read the stored rows: no pointers, one byte order."""
        is_uniform = self.stored in (self.stored.newbyteorder("<"), self.stored.newbyteorder(">"))
        is_plain = self.stored.subdtype is None and self.stored.kind != "S"
        return not self.stored.hasobject and is_plain and is_uniform

    @property
    def row_bytes(self) -> int:
        """Bytes of a stored row in memory."""
        return max(1, math.prod(self.shape) * self.stored.itemsize)

    def delivered(self) -> tuple[tuple[int, ...], np.dtype[Any]]:
        """Return shape and dtype of a delivered row.

        Raises:
            ValueError: saying what the values cannot become.
        """
        dtype, shape = self._inner()
        if self.picks:
            counts = [
                size if pick is None else len(pick)
                for size, pick in zip(shape, self.picks, strict=True)
            ]
            shape = tuple(counts)
        if self.squeeze:
            shape = tuple(size for size in shape if size != 1)
        if self.classes is not None:
            return shape, np.dtype(np.int64 if self.dtype is None else self.dtype)
        if (width := _width(self.dtype, dtype)) is not None:
            return (*shape, width), np.dtype(np.uint8)
        if self.whole and self.dtype is None:
            raise ValueError('numpy has no type for its numbers: say dtype = "int64" or so')
        return shape, _number_format(self.dtype, np.dtype(np.int64) if self.whole else dtype)

    def make(self, rows: Rows) -> Rows:
        """Return delivered rows, of the shape and dtype that `delivered` gives.

        Args:
            rows: (rows, *shape), of `stored`; of objects with the first member taken.

        Raises:
            UnfitRowError: naming a row that cannot become what is asked for.
        """
        shape, dtype = self.delivered()
        members = self.members[1:] if self.stored.hasobject else self.members
        values = rows
        for member in members:
            values = values[member]
        if self.picks:
            values = _picked(values, self.picks)
        if self.classes is not None:
            made = self._classes_of(values)
        elif dtype == np.uint8 and _width(self.dtype, self._inner()[0]) is not None:
            made = _as_bytes(values, shape[-1])
        elif self.whole:
            made = _cast(_as_whole(values, self.whole), dtype)
        elif values.dtype.names is not None:
            made = _as_complex(values).astype(dtype, copy=False)
        else:
            made = _cast(self._without_nan(values), dtype)
        return made.reshape(len(rows), *shape)

    def to_json(self) -> dict[str, Any]:
        """Return what decides values, for the record of a run."""
        usual = {each.name: each.default for each in dataclasses.fields(self)}
        kept = ("members", "picks", "dtype", "classes", "missing", "sequence")
        said = {key: getattr(self, key) for key in kept}
        return {key: _listed(value) for key, value in said.items() if value != usual[key]}

    def _inner(self) -> tuple[np.dtype[Any], tuple[int, ...]]:
        """Return dtype and shape of a row once the members are taken."""
        dtype, shape = self.stored.base, (*self.shape, *self.stored.shape)
        for member in self.members:
            if dtype.names is None or member not in dtype.names:
                raise ValueError(f'it has no member "{member}"{_members(dtype)}')
            dtype = dtype[member]
            if dtype.subdtype is not None:
                dtype, inner = dtype.subdtype
                shape = (*shape, *inner)
        return dtype, shape

    def _classes_of(self, values: Rows) -> Rows:
        assert self.classes is not None
        known = np.array([each.encode() for each in self.classes])
        if self.codes is not None:
            given, known = values, np.array(self.codes)
        else:
            given = _texts(values)
        order = np.argsort(known, kind="stable")
        at = np.minimum(np.searchsorted(known, given, sorter=order), len(known) - 1)
        found = order[at]
        is_known = known[found] == given
        if self.missing is None:
            _require(is_known, given, f"is none of the classes{_OR_MISSING}")
        else:
            found = np.where(is_known, found, self.missing)
        return found.astype(self.delivered()[1])

    def _without_nan(self, values: Rows) -> Rows:
        """Return numbers with what is missing in place of NaN, if that is a number."""
        if self.missing is None or values.dtype.kind != "f":
            return values
        return np.where(np.isnan(values), values.dtype.type(self.missing), values)


def frozen(wanted: object) -> object:
    """Return what a config says is selected, lists as tuples."""
    return tuple(map(frozen, wanted)) if isinstance(wanted, list) else wanted


def form_of(
    wish: Wish,
    members: Sequence[str],
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    select: Sequence[tuple[int, Pick]] = (),
    names: Mapping[str, int] | None = None,
    whole: str = "",
) -> Form:
    """Return how rows of an HDF5 dataset become those that are wished for.

    Args:
        wish: what the user says.
        members: at the end of its path, of compound types.
        shape: of a stored row.
        dtype: of its values.
        select: the indices that are taken, by axis of a sample.
        names: of the numbers of an enumeration.
        whole: as in Form.

    Raises:
        ValueError: saying what cannot be.
    """
    path = wish.path.strip("/")
    for _ in members:
        path = path.rpartition("/")[0]
    form = Form(
        path=path,
        shape=shape,
        stored=without_metadata(dtype),
        members=tuple(members),
        squeeze=wish.squeeze,
        dtype=wish.dtype,
        classes=wish.classes,
        missing=wish.missing,
        whole=whole,
    )
    kind, inner = form._inner()
    if kind.hasobject and members and shape:
        raise ValueError("it is text in a compound type, of several values a row")
    picks = _picks(select, inner)
    codes = None
    if wish.classes is not None:
        codes = _codes(wish.classes, kind, names)
    form = dataclasses.replace(form, picks=picks, codes=codes)
    _, dtype = form.delivered()
    if wish.missing is not None:
        if dtype.kind not in "iu":
            raise ValueError("missing is for classes, and for numbers in whole ones (dtype)")
        about = np.iinfo(dtype)
        if not about.min <= wish.missing <= about.max:
            raise ValueError(f"missing = {wish.missing} is not a number of {dtype}")
    return form


def without_metadata(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return a dtype without what h5py notes beside it, which no message between ranks may have."""
    if dtype.names is not None:
        fields: Mapping[str, Any] = dtype.fields or {}
        made: np.dtype[Any] = np.dtype(
            {
                "names": list(dtype.names),
                "formats": [without_metadata(fields[name][0]) for name in dtype.names],
                "offsets": [fields[name][1] for name in dtype.names],
                "itemsize": dtype.itemsize,
            }
        )
        return made
    if dtype.subdtype is not None:
        inner, shape = dtype.subdtype
        whole: np.dtype[Any] = np.dtype((without_metadata(inner), shape))
        return whole
    bare: np.dtype[Any] = np.dtype(dtype.str)
    return bare


def _picks(select: Sequence[tuple[int, Pick]], shape: tuple[int, ...]) -> tuple[Pick, ...]:
    picks: list[Pick] = [None] * len(shape)
    for axis, indices in select:
        if axis >= len(shape):
            raise ValueError(f"a sample has the shape {shape}, and no axis {axis} to select of")
        size = shape[axis]
        if not indices:
            raise ValueError(f"select takes nothing of its axis {axis}, which has {size}")
        wrong = [index for index in indices if not -size <= index < size]
        if wrong:
            raise ValueError(f"axis {axis} of a sample has {size}, and no index {wrong[0]}")
        picks[axis] = tuple(index % size for index in indices)
    return tuple(picks) if select else ()


def _codes(
    classes: Sequence[str], kind: np.dtype[Any], names: Mapping[str, int] | None
) -> tuple[int, ...] | None:
    if names is not None:
        unknown = [each for each in classes if each not in names]
        if unknown:
            raise ValueError(f'"{unknown[0]}" is not a name of its numbers: {listed(list(names))}')
        return tuple(names[each] for each in classes)
    if kind.kind not in "SO":
        raise ValueError(f"classes are of texts or of an enumeration, and it is {kind}")
    return None


def _width(wanted: str | None, dtype: np.dtype[Any]) -> int | None:
    """Return how many bytes are delivered of each value; None: they are numbers."""
    if wanted is None:
        return None
    if wanted == BYTES:
        if dtype.hasobject:
            raise ValueError('its texts are of any length: say how much of each, dtype = "S20"')
        return dtype.itemsize
    found = _TEXT.fullmatch(wanted)
    if found is None:
        return None
    if dtype.kind not in "SO":
        raise ValueError(f'it is {dtype} and not text: dtype = "bytes" takes its bytes')
    return int(found[1])


def _number_format(wanted: str | None, dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return the dtype that numbers are delivered in.

    Raises:
        ValueError: if they are none, or would lose a part.
    """
    if dtype.names is not None:
        pair = _pair(dtype)
        if pair is None:
            raise ValueError(f"it is of a compound type: name a member{_members(dtype)}")
        if wanted is None:
            return pair
        if np.dtype(wanted).kind != "c":
            raise ValueError(f'it is complex: dtype = "{pair}", or a member{_members(dtype)}')
        return np.dtype(wanted)
    if dtype.kind in "SO":
        raise ValueError('it is text: say classes = "sorted" or a list, or dtype = "S20"')
    if dtype.kind == "V":
        raise ValueError('it is opaque: dtype = "bytes" takes its bytes')
    if dtype.kind in "mM":
        if wanted != "int64":
            raise ValueError(f'it is {dtype}, a time: dtype = "int64" takes its number')
        return np.dtype(np.int64)
    if wanted is None:
        return dtype
    made = np.dtype(wanted)
    if dtype.kind == "c" and made.kind != "c":
        raise ValueError(f"it is complex, and {wanted} has no imaginary part")
    return made


def _pair(dtype: np.dtype[Any]) -> np.dtype[Any] | None:
    """Return the complex dtype that two members stand for."""
    if dtype.names not in COMPLEX_PAIRS or not dtype.names:
        return None
    one, two = (dtype[name].newbyteorder("=") for name in dtype.names)
    if one != two or one.name not in ("float32", "float64"):
        return None
    return np.dtype(np.complex64 if one.itemsize == 4 else np.complex128)


def _as_complex(values: Rows) -> Rows:
    real, imaginary = values.dtype.names or ()
    pair = _pair(values.dtype)
    assert pair is not None
    made = np.empty(values.shape, pair)
    made.real, made.imag = values[real], values[imaginary]
    return made


def _picked(values: Rows, picks: Sequence[Pick]) -> Rows:
    """Return what is selected; neighbours and steps without a copy."""
    for axis, pick in enumerate(picks, 1):
        if pick is not None:
            values = values[(slice(None),) * axis + (_index(pick),)]
    return values


def _index(pick: tuple[int, ...]) -> slice | list[int]:
    if len(pick) == 1:
        return slice(pick[0], pick[0] + 1)
    step = pick[1] - pick[0]
    if step > 0 and list(pick) == list(range(pick[0], pick[-1] + 1, step)):
        return slice(pick[0], pick[-1] + 1, step)
    return list(pick)


def _texts(values: Rows) -> Rows:
    """Return texts as bytes of one width, without what pads them."""
    if values.dtype.kind == "S":
        return values
    flat = [each.encode() if isinstance(each, str) else bytes(each) for each in values.ravel()]
    return np.array(flat, dtype=f"S{max(1, *map(len, flat), 1)}").reshape(values.shape)


def _as_bytes(values: Rows, width: int) -> Rows:
    """Return (*values, width) uint8, texts filled up with zeros."""
    if values.dtype.kind in "SO":
        texts = _texts(values)
        longest = np.char.str_len(texts)
        _require(longest <= width, texts, f"has more than {width} bytes")
        values = texts.astype(f"S{width}")
    whole = np.ascontiguousarray(values)
    return whole.view(np.uint8).reshape(*values.shape, width)


def _as_whole(values: Rows, whole: str) -> Rows:
    """Return numbers of a few bytes each as those of eight."""
    order, sign, size = whole[0], whole[1], int(whole[2:])
    given = np.ascontiguousarray(values).view(np.uint8).reshape(*values.shape, size)
    given = given if order == "<" else given[..., ::-1]
    wide = np.zeros((*values.shape, 8), np.uint8)
    wide[..., :size] = given
    if sign == "i":
        wide[..., size:] = np.where(given[..., -1:] & 0x80, 0xFF, 0)
    made: Rows = wide.view(f"<{sign}8")[..., 0]
    return made


def _cast(values: Rows, dtype: np.dtype[Any]) -> Rows:
    """Return numbers in another format; floats are rounded, and nothing else is."""
    if values.dtype.kind in "mM":
        values = values.view(f"{values.dtype.byteorder}i8")
    if values.dtype == dtype:
        return values
    with np.errstate(over="ignore", invalid="ignore"):
        made = values.astype(dtype)
        if made.dtype.kind in "iub":
            _require(made == values, values, f"is not a number of {dtype}{_nan_hint(values)}")
        elif made.dtype.kind == "f" and not np.can_cast(values.dtype, dtype):
            grown = np.isinf(made) & ~np.isinf(values)
            _require(~grown, values, f"is too large for {dtype}")
    return made


def _nan_hint(values: Rows) -> str:
    """Return what to do about NaN that is to be a whole number."""
    has_nan = values.dtype.kind == "f" and bool(np.isnan(values).any())
    return ": say what stands for NaN: a mask, or missing = -100" if has_nan else ""


def _require(is_right: npt.NDArray[np.bool_], values: Rows, problem: str) -> None:
    if is_right.all():
        return
    at = tuple(np.argwhere(~is_right)[0])
    raise UnfitRowError(int(at[0]), f"{values[at]!r:.80} {problem}")


def _members(dtype: np.dtype[Any]) -> str:
    names = list(dtype.names or ())
    return f"; it has {listed(names, 20)}" if names else ", and no members"


def _listed(value: Any) -> Any:
    return [_listed(each) for each in value] if isinstance(value, tuple) else value
