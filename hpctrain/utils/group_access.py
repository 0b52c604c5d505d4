"""Folders that a group writes to, and whose permission was missing. Standard library only.

A folder with setgid and write permission for its group is open to it: what hpctrain makes in there
is so too, whatever the umask, and whoever makes it. So colleagues can go on with each other's runs.
"""

from __future__ import annotations

import errno
import os
import stat
from contextlib import suppress
from pathlib import Path

_FILE, _FOLDER = stat.S_IRGRP | stat.S_IWGRP, stat.S_ISGID | stat.S_IRWXG
_IS_OPEN = stat.S_ISGID | stat.S_IWGRP


def is_open(folder: Path) -> bool:
    """Tell whether a folder is one that its group writes to."""
    try:
        return folder.stat().st_mode & _IS_OPEN == _IS_OPEN
    except OSError:
        return False


def open_folder(folder: Path) -> None:
    """Open a folder to its group.

    Raises:
        OSError: if that is not possible, such as for a folder of somebody else.
    """
    mode = stat.S_IMODE(folder.stat().st_mode)
    if mode & _FOLDER != _FOLDER:
        folder.chmod(mode | _FOLDER)
    if not is_open(folder):
        # The bit is dropped where the group is not the user's, and where none are kept.
        raise OSError(errno.EPERM, "the setgid bit does not stay", str(folder))


def follow_folder(path: Path) -> None:
    """Open a new file or folder to the group, if the one that it is in is open."""
    if is_open(path.parent):
        _open(path)


def open_tree(folder: Path) -> None:
    """Open all that this user has in a folder, if it is open."""
    if is_open(folder):
        for place, folders, files in os.walk(folder):
            for name in (*folders, *files):
                _open(Path(place, name))


def explained(error: OSError, path: Path) -> str:
    """Return what failed; where permission was missing, of which file, whose, and what helps.

    Args:
        error: a failure.
        path: what was to be read or written, where the error does not say.
    """
    words = error.strerror or str(error)
    if error.errno not in (errno.EACCES, errno.EPERM):
        return words
    place = Path(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes) else path
    for at in (place, *place.absolute().parents):
        with suppress(OSError):
            facts = at.lstat()
            who = f"{_user(facts.st_uid)}:{_group(facts.st_gid)}"
            return (
                f"{words}: {at} belongs to {who}, mode {stat.filemode(facts.st_mode)}. A run with "
                "run.group_writable = true can be gone on with by its group"
            )
    return words


def _open(path: Path) -> None:
    with suppress(OSError):
        facts = path.lstat()
        wanted = _FOLDER if stat.S_ISDIR(facts.st_mode) else _FILE
        is_plain = stat.S_ISDIR(facts.st_mode) or stat.S_ISREG(facts.st_mode)
        mode = stat.S_IMODE(facts.st_mode)
        if is_plain and mode & wanted != wanted and facts.st_uid == os.geteuid():
            path.chmod(mode | wanted)


def _user(number: int) -> str:
    import pwd

    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return str(number)


def _group(number: int) -> str:
    import grp

    try:
        return grp.getgrgid(number).gr_name
    except KeyError:
        return str(number)
