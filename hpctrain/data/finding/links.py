"""Links in HDF5 files, looked at before HDF5 follows them: to a pipe it would wait for ever."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import h5py

from hpctrain.data.storage import open_hdf5_file
from hpctrain.utils.files import require_regular

MOST_LINKS = 16
"""On the way to a dataset; HDF5 follows as many by default."""


def require_files_behind(group: h5py.Group, path: str, most: int = MOST_LINKS) -> None:
    """Check that what the links of a path name in other files are files.

    What is not there is no matter of this function.

    Raises:
        OSError: if something else is there, such as a pipe, or the links lead on and on.
    """
    if most < 0:
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)
    here: h5py.Group = group.file["/"] if path.startswith("/") else group
    parts = [part for part in _raw(path).split(b"/") if part not in (b"", b".")]
    for index, part in enumerate(parts):
        links = here.id.links
        if not links.exists(part):
            return
        kind = links.get_info(part).type
        if kind == h5py.h5l.TYPE_HARD:
            opened = h5py.h5o.open(here.id, part)
            if not isinstance(opened, h5py.h5g.GroupID):
                return
            here = h5py.Group(opened)
            continue
        rest = b"/".join(parts[index + 1 :])
        if kind == h5py.h5l.TYPE_SOFT:
            require_files_behind(here, _text(links.get_val(part) + b"/" + rest), most - 1)
        elif kind == h5py.h5l.TYPE_EXTERNAL:
            name, inside = links.get_val(part)
            for candidate in _candidates(_text(name), here.file.filename):
                require_regular(candidate)
                with open_hdf5_file(candidate) as other:
                    require_files_behind(other, _text(inside + b"/" + rest), most - 1)
        return


def _candidates(name: str, own: str) -> Iterator[Path]:
    """Yield what is there of all that HDF5 may open for the name of another file.

    Source: H5Lcreate_external.
    """
    prefixes = os.environ.get("HDF5_EXT_PREFIX", "").split(":")
    folder = Path(own).parent
    for place in (Path(name), *(Path(each, name) for each in prefixes if each), folder / name):
        if place.exists():
            yield place
    beside = folder / Path(name).name
    if beside.exists():
        yield beside


def _raw(text: str) -> bytes:
    return text.encode("utf-8", errors="surrogateescape")


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", errors="surrogateescape")
