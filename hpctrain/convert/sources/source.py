"""What packing asks of a source, whatever its files are."""

from __future__ import annotations

import dataclasses
import importlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import xxhash

from hpctrain.data.arrays import Int64s
from hpctrain.data.dataset import Field, require_fields, require_supported
from hpctrain.data.ragged import Ragged
from hpctrain.errors import DatasetError, HpctrainError
from hpctrain.utils.files import require_regular

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
Arrays = dict[str, npt.NDArray[Any]]
Samples = Mapping[str, npt.NDArray[Any] | Ragged]


class ArrayFacts(NamedTuple):
    """What is known of an array without reading it.

    Attributes:
        shape: all axes, the samples' one included.
        dtype: of its values.
        attributes: what HDF5 keeps beside the values.
        is_coordinate: whether it only says where along an axis the values of others lie; such ones
            are packed only where they are named.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    attributes: Mapping[str, Any]
    is_coordinate: bool = False


class Source(Protocol):
    """Samples, by number. Picklable: one rank finds it, and every rank reads from its own copy."""

    @property
    def name(self) -> str:
        """What the user called it."""
        ...

    @property
    def samples(self) -> int: ...

    @property
    def fields(self) -> Mapping[str, Field]:
        """In this machine's byte order; `mean_rows` is given of samples of unequal length."""
        ...

    @property
    def attributes(self) -> Mapping[str, Mapping[str, Any]]:
        """By field, what HDF5 keeps beside its values, such as {"units": "kelvin"}."""
        ...

    @property
    def identity(self) -> str:
        """Changes when a file of the source does."""
        ...

    def read(self, rows: Int64s) -> Samples:
        """Return the samples of these numbers, in any order, each at most once.

        Returns:
            By field, (rows, *shape); or `Ragged`, where samples are of unequal length.

        Raises:
            DatasetError: naming file, field and row that cannot be read.
        """
        ...


def identity_of(paths: Iterable[str | Path]) -> str:
    """Return a hash of names, sizes and times of change; of a folder, those of all files in it.

    Raises:
        DatasetError: if one of the files is not there.
    """
    digest = xxhash.xxh3_64()
    given = list(paths)
    for url in filter(is_url, given):
        digest.update(_metadata_of(str(url)))
    here = [each for each in given if not is_url(each)]
    for path in (file for each in here for file in _files_of(each)):
        try:
            status = require_regular(path)
        except OSError as error:
            raise DatasetError(f"{path}: {error.strerror}") from error
        digest.update(f"{path}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return str(digest.hexdigest())


def _metadata_of(url: str) -> bytes:
    """Return what a Zarr store tells of all its arrays: how many chunks it has, nobody tells."""
    fsspec = optional("fsspec", "remote", f"{url.partition('://')[0]}:// is")
    with reading(url):
        system, place = fsspec.core.url_to_fs(url.rstrip("/"))
        names = (".zmetadata", "zarr.json", ".zgroup", ".zarray", ".zattrs")
        found = [f"{place}/{name}" for name in names if system.exists(f"{place}/{name}")]
        return b"".join([url.encode(), *(system.cat_file(each) for each in found)])


def is_url(path: str | Path) -> bool:
    """Tell whether this is behind a network, or in another file system of fsspec's."""
    return _URL.match(str(path)) is not None


def _files_of(path: str | Path) -> Iterator[str | Path]:
    """Yield a file itself, or the files anywhere in a folder, always in the same order."""
    if not Path(path).is_dir():
        yield path
        return
    for folder, folders, names in os.walk(path):
        folders.sort()
        yield from (Path(folder, name) for name in sorted(names))


@contextmanager
def reading(place: str) -> Iterator[None]:
    """Explain whatever a parser makes of a damaged file; which exceptions, nobody can tell.

    Raises:
        DatasetError: naming the place, if the body fails.
    """
    try:
        yield
    except HpctrainError:
        raise
    except Exception as error:
        what = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise DatasetError(
            f"{place}: this file cannot be read: {what}. Get the file again, or leave it out"
        ) from error


def optional(module: str, extra: str, what: str) -> ModuleType:
    """Return a module that not everybody has installed.

    Args:
        module: its name.
        extra: of hpctrain, which brings it.
        what: it is for, such as "Zarr stores are".

    Raises:
        DatasetError: naming the extra, if it is not there.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        name = module.partition(".")[0]
        raise DatasetError(
            f"{what} read by {name}, which is not installed: pip install 'hpctrain[{extra}]'"
        ) from error


_OF_VALUES = ("units", "calendar")
"""Attributes by which the same number is another value."""


def require_same_units(name: str, said: Iterable[tuple[str, Mapping[str, Any]]]) -> None:
    """Check that the values of a field are in one unit in all files, such as days since one date.

    Args:
        name: of the field.
        said: the path of each file, and the attributes of the field there.

    Raises:
        DatasetError: if they are not: what is packed has one.
    """
    first: tuple[str, dict[str, str]] | None = None
    for path, attributes in said:
        units = {key: str(attributes[key]) for key in _OF_VALUES if key in attributes}
        if first is None:
            first = path, units
        elif units != first[1]:
            here, there = (", ".join(each.values()) or "no unit" for each in (units, first[1]))
            raise DatasetError(
                f'{path}: field "{name}" is in {here}, but in {there} in {first[0]}: its numbers '
                "would be taken for those of one unit. Leave the field out, or write the files "
                "with one unit, xarray's to_netcdf(encoding={NAME: {'units': ...}}). Training "
                "takes such files as they are"
            )


def kept_attributes(found: Mapping[str, Any]) -> dict[str, Any]:
    """Return those attributes that HDF5 can keep too: texts, numbers and lists of these."""
    kept: dict[str, Any] = {}
    for name, value in found.items():
        array = np.asarray(value) if isinstance(value, list | tuple) else value
        if isinstance(array, str | bytes | int | float) or (
            isinstance(array, np.generic | np.ndarray) and array.dtype.kind in "biufcSU"
        ):
            kept[name] = array
    return kept


def native(shape: tuple[int, ...], dtype: np.dtype[Any], name: str, place: str) -> Field:
    """Return a field in this machine's byte order, if it can become a tensor.

    Raises:
        DatasetError: if it cannot.
    """
    field = Field(shape, dtype.newbyteorder("="))
    require_supported(name, field, place)
    return field


@dataclass(frozen=True)
class Converted:
    """A source some of whose fields get another dtype, without loss of range.

    Attributes:
        source: as it is.
        dtypes: by field.
    """

    source: Source
    dtypes: Mapping[str, np.dtype[Any]]

    def __post_init__(self) -> None:
        require_fields(self.dtypes, self.source.fields, self.source.name)
        for name, field in self.fields.items():
            require_supported(name, field, self.source.name)

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def samples(self) -> int:
        return self.source.samples

    @property
    def fields(self) -> Mapping[str, Field]:
        return {
            name: dataclasses.replace(field, dtype=self.dtypes.get(name, field.dtype))
            for name, field in self.source.fields.items()
        }

    @property
    def attributes(self) -> Mapping[str, Mapping[str, Any]]:
        return self.source.attributes

    @property
    def identity(self) -> str:
        dtypes = {name: dtype.str for name, dtype in sorted(self.dtypes.items())}
        return f"{self.source.identity} {dtypes}"

    def read(self, rows: Int64s) -> Samples:
        """Return samples, as `Source.read` does.

        Raises:
            DatasetError: also if a value does not fit its new dtype.
        """
        arrays = dict(self.source.read(rows))
        for name, dtype in self.dtypes.items():
            values = arrays[name]
            assert not isinstance(values, Ragged), "encoded images have no --dtype"
            arrays[name] = self._convert(name, values, dtype, rows)
        return arrays

    def _convert(
        self, name: str, values: npt.NDArray[Any], dtype: np.dtype[Any], rows: Int64s
    ) -> npt.NDArray[Any]:
        with np.errstate(invalid="ignore", over="ignore"):
            converted = values.astype(dtype)
        if dtype.kind in "biu":
            lost = converted != values
        else:
            lost = np.isfinite(values) & ~np.isfinite(converted)
        if lost.any():
            place = tuple(np.argwhere(lost)[0])
            raise DatasetError(
                f'{self.source.name}: field "{name}", row {rows[place[0]]}: {values[place]} does '
                f"not fit {dtype}. Choose a wider dtype"
            )
        return converted
