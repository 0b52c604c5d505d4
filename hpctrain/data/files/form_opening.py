"""From what the user says of a field as it is stored to its Form: asked of an open HDF5 file.

Members of compound types by their path, selections by the values of a coordinate, the names of
enumerations, and all texts that there are.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
from h5py import h5t

from hpctrain.data.dataset import WHOLE
from hpctrain.data.files.coordinates import Values, find_coordinate, values_of
from hpctrain.data.files.global_heaps import require_sound_heap
from hpctrain.data.files.storage import HDF5_FAILURES, dtype_of, open_hdf5_file, read_attribute
from hpctrain.data.files.walking import require_files_behind
from hpctrain.data.forms import Form, Pick, Wish, form_of, without_metadata
from hpctrain.errors import DatasetError
from hpctrain.utils.text import listed

MOST_CLASSES = 2**16
"""That are found by looking at all texts; more are no classes."""
WIDEST_NUMBER = 8
"""Bytes of whole numbers that are made of what numpy has no type for."""
_TEXTS_AT_ONCE = 2**16


def find_stored(file: h5py.File, path: str) -> tuple[h5py.Dataset | None, list[str]]:
    """Return the HDF5 dataset at a path, and the members of its type that the path goes on with.

    Returns:
        None for the dataset if there is none.
    """
    names = path.strip("/").split("/")
    for count in range(len(names), 0, -1):
        place = "/".join(names[:count])
        try:
            require_files_behind(file, place)
            found = file.get(place)
        except HDF5_FAILURES:
            continue
        if is_categorical(found) and count == len(names):
            return found["codes"], []
        if isinstance(found, h5py.Dataset):
            members = names[count:]
            return (found, members) if not members or _has_members(found) else (None, [])
    return None, []


def is_categorical(found: object) -> bool:
    """Tell whether an object is AnnData's group of codes and the categories that they stand for.

    Source: AnnData's on-disk format, categorical arrays.
    """
    if not isinstance(found, h5py.Group) or not {"codes", "categories"} <= found.keys():
        return False
    name = "encoding-type"
    kind = read_attribute(found.attrs, name) if name in found.attrs else None
    return (kind.decode() if isinstance(kind, bytes) else kind) == "categorical"


def categories_in(group: h5py.Group) -> npt.NDArray[np.bytes_]:
    """Return the texts that AnnData's codes stand for.

    Raises:
        ValueError: if they are not texts.
    """
    require_sound_heap(group["categories"])
    texts = group["categories"][()]
    if texts.dtype.kind not in "SO":
        raise ValueError(f"its categories are {texts.dtype}, and classes are of texts")
    return np.array([bytes(each) for each in texts.tolist()], np.bytes_)


def _has_members(dataset: h5py.Dataset) -> bool:
    return isinstance(dataset.id.get_type(), h5py.h5t.TypeCompoundID)


def form_in(
    file: h5py.File, dataset: h5py.Dataset, members: Sequence[str], wish: Wish, axis: int | None
) -> Form:
    """Return what becomes of the rows of an HDF5 dataset.

    Args:
        file: that is open.
        dataset: in it.
        members: of its type.
        wish: of the field.
        axis: that counts the rows; None: all of it is one row.

    Raises:
        ValueError: saying what cannot be.
    """
    if axis == WHOLE:
        raise ValueError('with axis = "none" an array is delivered as it is stored')
    if wish.sequence and not dataset.shape:
        return _sequence_of(dataset, wish)
    if axis is not None and (not dataset.shape or axis >= len(dataset.shape)):
        raise ValueError(f"it has the shape {dataset.shape}, and no axis {axis}")
    if wish.sequence:
        return _sequence_of(dataset, wish)
    shape = _without(dataset.shape, axis)
    dtype = dtype_of(dataset)
    if is_categorical(group := file.get(wish.path.strip("/"))):
        if wish.classes is None:
            raise ValueError(
                'categories, as AnnData stores them: say classes = "sorted" for their texts, or '
                f'path = "{wish.path.strip("/")}/codes" for the numbers'
            )
        categories_in(group)
        dtype = np.dtype(object)  # other files may have other codes for a text
    inner, behind = _member(dtype, members)
    picks = [_pick(file, dataset, axis, key, wanted, wish, behind) for key, wanted in wish.select]
    if h5py.check_ref_dtype(inner) is not None:
        raise ValueError(
            "it holds references, to places in this file: follow them where the file is made, "
            "and store the values"
        )
    if (of := h5py.check_vlen_dtype(inner)) is not None and of not in (str, bytes):
        raise ValueError("its samples are of unequal length: that is said by batch, not by these")
    whole = whole_number(dataset.id.get_type(), members) if inner.kind == "V" else ""
    return form_of(wish, members, shape, dtype, picks, h5py.check_enum_dtype(inner), whole)


def whole_number(kind: h5t.TypeID, members: Sequence[str] = ()) -> str:
    """Return how bytes that numpy has no type for make a whole number, see `Form`; empty: none."""
    for member in members:
        kind = kind.get_super() if isinstance(kind, h5t.TypeArrayID) else kind
        if not isinstance(kind, h5t.TypeCompoundID):
            return ""
        names = [kind.get_member_name(i) for i in range(kind.get_nmembers())]
        if member.encode() not in names:
            return ""
        kind = kind.get_member_type(names.index(member.encode()))
    size = kind.get_size()
    if isinstance(kind, h5t.TypeTimeID):
        # Of eight bytes nobody knows what they are: PyTables keeps two numbers in them.
        return {4: ">i4" if kind.equal(h5t.UNIX_D32BE) else "<i4"}.get(size, "")
    if not isinstance(kind, h5t.TypeIntegerID | h5t.TypeBitfieldID) or size > WIDEST_NUMBER:
        return ""
    is_signed = isinstance(kind, h5t.TypeIntegerID) and kind.get_sign() == h5t.SGN_2
    order = ">" if kind.get_order() == h5t.ORDER_BE else "<"
    return f"{order}{'i' if is_signed else 'u'}{size}"


def is_sequence(dataset: h5py.Dataset) -> bool:
    """Tell whether the rows of a dataset are of variable length: numbers, or texts."""
    kind = dataset.id.get_type()
    is_text = isinstance(kind, h5py.h5t.TypeStringID) and kind.is_variable_str()
    return isinstance(kind, h5py.h5t.TypeVlenID) or is_text


def _sequence_of(dataset: h5py.Dataset, wish: Wish) -> Form:
    """Return what becomes of rows of variable length.

    Raises:
        ValueError: saying what cannot be.
    """
    if dataset.ndim > 1:
        raise ValueError(f"of shape {dataset.shape}: one sequence a row can be batched")
    if wish != Wish(path=wish.path, sequence=True):
        raise ValueError(
            "its samples are of unequal length, which are delivered as they are: "
            "leave dtype, squeeze, select and classes out"
        )
    is_text = h5py.check_string_dtype(dataset.dtype) is not None
    values = np.dtype(np.uint8 if is_text else h5py.check_vlen_dtype(dataset.dtype))
    stored, shape = values.subdtype or (values, ())
    if stored.kind not in "iufbc":
        raise ValueError(
            "sequences can be of numbers: write others one after the other, with offsets"
        )
    return Form(
        path=wish.path.strip("/"), shape=shape, stored=without_metadata(stored), sequence=True
    )


def _without(shape: tuple[int, ...], axis: int | None) -> tuple[int, ...]:
    return shape if axis is None else (*shape[:axis], *shape[axis + 1 :])


def _member(dtype: Any, members: Sequence[str]) -> tuple[Any, tuple[int, ...]]:
    """Return the type of a member as far as there is one, and the axes that it has of its own."""
    behind: tuple[int, ...] = ()
    for member in members:
        if dtype.names is None or member not in dtype.names:
            break
        dtype = dtype[member]
        if dtype.subdtype is not None:
            dtype, shape = dtype.subdtype
            behind += shape
    return dtype, behind


def _pick(
    file: h5py.File,
    dataset: h5py.Dataset,
    axis: int | None,
    key: str,
    wanted: Any,
    wish: Wish,
    behind: tuple[int, ...],
) -> tuple[int, Pick]:
    """Return an axis of a sample, and the indices that are taken of it.

    Args:
        file: that is open.
        dataset: in it.
        axis: that counts its rows; None: none does.
        key: number of an axis of a sample, or name of a coordinate.
        wanted: indices, a slice, or values.
        wish: of the field.
        behind: axes that a member has behind those of the dataset.
    """
    if key.isdecimal():
        number = int(key)
        shape = (*_without(dataset.shape, axis), *behind)
        return number, _indices(wanted, shape[number] if number < len(shape) else None)
    scale, number = find_coordinate(file, dataset, key)
    if number == axis:
        raise ValueError(f'"{key}" counts its samples: say which by [data.samples]')
    values = values_of(scale)
    found = [i for each in wanted for i in _indices_of(each, values, key, nearest=wish.nearest)]
    return number - (axis is not None and number > axis), tuple(found)


def _indices(wanted: Any, size: int | None) -> tuple[int, ...]:
    if isinstance(wanted, str):
        if size is None:
            return (0,)  # the missing axis is reported where the shape is known
        bounds = [int(part) if part else None for part in wanted.split(":")]
        return tuple(range(size)[slice(*bounds)])
    return tuple(wanted)


def _indices_of(wanted: Any, values: Values, key: str, *, nearest: bool) -> list[int]:
    """Return where a coordinate has a value, or all values of a range, in the file's order.

    Raises:
        ValueError: if it has no such value, or several.
    """
    found: list[int]
    try:
        if isinstance(wanted, tuple):
            found = np.flatnonzero(values.between(*wanted)).tolist()
            if not found:
                raise ValueError(f"has none from {wanted[0]} to {wanted[1]}{_known(values)}")
            return found
        if nearest:
            return [values.nearest(wanted)]
        found = np.flatnonzero(values.between(wanted, wanted)).tolist()
    except ValueError as error:
        raise ValueError(f'"{key}" {error}') from None
    if len(found) != 1:
        more = "; the nearest is taken with nearest = true" if not found else ""
        raise ValueError(f'"{key}" has {len(found)} values {wanted}{_known(values)}{more}')
    return found


def _known(values: Values) -> str:
    return f": {listed([values.text(each) for each in values.numbers.tolist()], 12)}"


def all_texts(paths: Iterable[str], place: str) -> tuple[str, ...]:
    """Return the different texts of a field in all of these files, sorted. Reads all of them.

    Raises:
        DatasetError: if it holds no texts, or too many to be classes.
    """
    found: set[bytes] = set()
    for path in paths:
        try:
            with open_hdf5_file(path) as file:
                dataset, members = find_stored(file, place)
                if dataset is None:
                    raise DatasetError(f'{path}: there is no field "{place}"')
                if is_categorical(group := file.get(place.strip("/"))):
                    found |= {*categories_in(group).tolist()}
                    continue
                if (names := h5py.check_enum_dtype(dtype_of(dataset))) is not None and not members:
                    found |= {name.encode() for name in names}
                    continue
                for start in range(0, dataset.shape[0], _TEXTS_AT_ONCE):
                    require_sound_heap(dataset, slice(start, start + _TEXTS_AT_ONCE))
                    rows = dataset.fields(members[0]) if members else dataset
                    values = rows[start : start + _TEXTS_AT_ONCE]
                    for member in members[1:]:
                        values = values[member]
                    if values.dtype.kind not in "SO":
                        raise DatasetError(f'{path}: field "{place}" holds no texts')
                    found |= {bytes(each) for each in values.ravel().tolist()}
                    if len(found) > MOST_CLASSES:
                        raise DatasetError(
                            f'{path}: field "{place}" has more than {MOST_CLASSES:,} different '
                            "texts, which are not classes: deliver them as bytes"
                        )
        except HDF5_FAILURES as error:
            raise DatasetError(f"{path}: HDF5 cannot read this file: {error}") from error
    return as_classes(found, f'field "{place}"')


def as_classes(found: Iterable[bytes], what: str) -> tuple[str, ...]:
    """Return texts as names of classes, in the order of their bytes.

    Args:
        found: the texts.
        what: they are of, for messages.

    Raises:
        DatasetError: if one is no text, which no config and no checkpoint could name.
    """
    try:
        return tuple(each.decode() for each in sorted(found))
    except UnicodeDecodeError as error:
        raise DatasetError(
            f"{what}: {error.object!r:.60} is not UTF-8, and classes have names: deliver the "
            'bytes of its texts, dtype = "S20", or write them as UTF-8'
        ) from None
