"""Faults of a file system in words, and what helps against them."""

from __future__ import annotations

import errno
from pathlib import Path

from hpctrain.utils.permissions import explained


def fact_of(error: OSError) -> str:
    """Return what failed, and of which file."""
    if isinstance(error, PermissionError) and error.filename:
        return explained(error, Path(str(error.filename)))
    where = f" ({error.filename})" if error.filename else ""
    return f"{error.strerror or error}{where}"


def advice_on(error: OSError) -> str:
    """Return what helps against a fault of the file system."""
    match error.errno:
        case errno.ENOENT | errno.ENOTDIR:
            return "let nobody remove the folders of a running job"
        case errno.EROFS | errno.EACCES | errno.EPERM:
            return "make the folder writable"
        case errno.ENOSPC | errno.EDQUOT | None:
            return "free some space"
        case _:
            return "have the file system looked at"
