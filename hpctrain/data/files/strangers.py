"""What a file is that is not HDF5, by its first bytes: a failed download, a pointer, a format.

Nobody is helped by "file signature not found" of a page of HTML that was saved as data.h5.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

HEAD_BYTES = 4096
_SIGNATURE = b"\x89HDF\r\n\x1a\n"
_PACKS = "`python -m hpctrain data pack` makes shards of it"
_LFS = re.compile(rb"version https://git-lfs[^\n]*\n(?:.*\n)*?size (\d+)")
_TITLE = re.compile(rb"<title[^>]*>\s*([^<]{1,80})", re.IGNORECASE)
_TRUNCATED = re.compile(r"truncated file: eof = (\d+), .*stored_eof = (\d+)")
_AGAIN = "download it again"
_FORMATS: Sequence[tuple[bytes, str]] = (
    (b"CDF\x01", f"netCDF-3, which is not HDF5: {_PACKS} (extra netcdf3)"),
    (b"CDF\x02", f"netCDF-3 (64-bit offsets), which is not HDF5: {_PACKS} (extra netcdf3)"),
    (b"CDF\x05", f"netCDF-3 (CDF-5), which is not HDF5: {_PACKS} (extra netcdf3)"),
    (b"\x0e\x03\x13\x01", "HDF4, which is not HDF5: h4toh5 converts it"),
    (b"GRIB", "GRIB: cfgrib and xarray make netCDF-4 of it"),
    (b"MATLAB 5.0", 'of MATLAB before v7.3: save it anew with "-v7.3"'),
    (b"SIMPLE  =", "FITS: astropy opens it"),
    (b"\x93NUMPY", f".npy of numpy: {_PACKS}"),
    (b"PAR1", f"Parquet: {_PACKS} (extra arrow)"),
    (b"ARROW1", f"Arrow: {_PACKS} (extra arrow)"),
    (b"\x1f\x8b", "compressed by gzip: gunzip it"),
    (b"BZh", "compressed by bzip2: bunzip2 it"),
    (b"\xfd7zXZ", "compressed by xz: unxz it"),
    (b"\x28\xb5\x2f\xfd", "compressed by Zstandard: unzstd it"),
    (b"PK\x03\x04", "a zip archive (or .npz of numpy): unpack it"),
    (b"%PDF", "PDF"),
    (b"\x89PNG", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"),
)
"""What files begin with, and what they are."""


class NotHDF5Error(OSError):
    """A file is something else than HDF5, or not all of one."""


def as_told(path: str | Path, error: OSError) -> OSError:
    """Return an error of HDF5 that says what a file is, if that is plain; else the error itself.

    Args:
        path: of the file.
        error: which HDF5 refused to open it with.
    """
    found = _TRUNCATED.search(str(error))
    if found is not None:
        there, whole = (int(each) for each in found.groups())
        return NotHDF5Error(
            f"truncated: {there:,} of {whole:,} bytes are there, as of a download or a copy that "
            "was interrupted. Bring the whole file back"
        )
    try:
        with Path(path).open("rb") as file:
            head = file.read(HEAD_BYTES)
    except OSError:
        return error
    what = kind_of(head)
    return error if what is None else NotHDF5Error(f"it is {what}")


def kind_of(head: bytes) -> str | None:
    """Return what a file is that begins so; None: HDF5, or nobody knows."""
    if not head:
        return f"empty: it has no byte. If it was downloaded, {_AGAIN}"
    if head.startswith(_SIGNATURE):
        return None
    found = _pointer_or_page(head) or _format(head)
    if found is not None or not _is_text(head):
        return found
    return f"text, beginning with {_plain(head[:40])!r}"


def _pointer_or_page(head: bytes) -> str | None:
    """Return what stands in place of a file that was not brought; None: nothing such."""
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    if (lfs := _LFS.match(head)) is not None:
        return f"a pointer of Git LFS to a file of {int(lfs[1]):,} bytes: `git lfs pull` brings it"
    if head.startswith(b"/annex/objects/") or (len(head) < 400 and b".git/annex/objects/" in head):
        return "a pointer of git-annex: `git annex get` (or `datalad get`) brings the file"
    if re.match(rb"<!doctype html|<html", text, re.IGNORECASE):
        title = _TITLE.search(head)
        said = "" if title is None else f' ("{_plain(title[1])}")'
        return f"a page of HTML{said}, such as a server's error or its login: {_AGAIN}"
    if text.startswith((b"<?xml", b"<Error>")):
        return f"XML, such as the error of an object store: {_AGAIN}"
    return None


def _format(head: bytes) -> str | None:
    """Return which other format a file is of; None: nobody knows."""
    for magic, what in _FORMATS:
        if head.startswith(magic):
            return what
    if head[257:262] == b"ustar":
        return "a tar archive: unpack it"
    if not head.strip(b"\0"):
        return "nothing but zeros where HDF5 begins, as of a copy that was interrupted"
    return None


def others_like_it(paths: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield those of several files that are plainly no HDF5, and what each is."""
    for path in paths:
        try:
            with Path(path).open("rb") as file:
                what = kind_of(file.read(HEAD_BYTES))
        except OSError:
            continue
        if what is not None:
            yield path, what


def _is_text(head: bytes) -> bool:
    try:
        head[:-3].decode("utf-8")  # the last letter may be cut
    except UnicodeDecodeError:
        return False
    return not re.search(rb"[\x00-\x08\x0e-\x1f]", head)


def _plain(raw: bytes) -> str:
    return " ".join(raw.decode("utf-8", errors="replace").split())
