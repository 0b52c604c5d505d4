"""Folders of this user's alone, folders that a group writes to, and whose permission was missing.

In a directory that others use too, such as /tmp, they may have planted a link, a folder or a pipe
under a name that can be guessed, and where the sticky bit is missing they may rename what is not
theirs. So a private folder is opened without following a link, its owner and mode are taken from
the descriptor, and it is not used where somebody else could put another one in its place.

A folder with setgid and write permission for its group is open to it: what hpctrain makes in there
is so too, whatever the umask, and whoever makes it. So colleagues can go on with each other's runs.

Standard library only: the watchdog uses it.
"""

from __future__ import annotations

import errno
import os
import stat
from contextlib import suppress
from pathlib import Path

_UID_MAP = Path("/proc/self/uid_map")

_OVERFLOW_UID = 65534
"""Owner, as a user namespace shows it, of what belongs to somebody outside of it, such as root."""

_OPEN_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC

_GROUP_FILE, _GROUP_FOLDER = stat.S_IRGRP | stat.S_IWGRP, stat.S_ISGID | stat.S_IRWXG

_IS_OPEN = stat.S_ISGID | stat.S_IWGRP


def require_stable(directory: str | Path) -> Path:
    """Return the real path of a directory in whose place nobody else can put another one.

    Raises:
        PermissionError: if somebody else can rename it, or a folder above it; it names that.
        OSError: if it cannot be looked at.
    """
    real = Path(os.path.realpath(directory, strict=True))
    trusted = _trusted_owners()
    # From the root on: each is looked at when nobody can exchange it any more.
    for folder in reversed((real, *real.parents)):
        facts = folder.lstat()
        if not stat.S_ISDIR(facts.st_mode):
            raise NotADirectoryError(f"{folder} is not a directory")
        if facts.st_uid not in trusted:
            raise PermissionError(
                f"{folder} belongs to user {facts.st_uid}, who can exchange what is in it"
            )
        if facts.st_mode & 0o022 and not facts.st_mode & stat.S_ISVTX:
            raise PermissionError(
                f"others can exchange what is in {folder}: its mode is "
                f"{stat.S_IMODE(facts.st_mode):04o}, without the sticky bit"
            )
    return real


def open_private(name: str, parent: int, place: Path, *, make: bool) -> int:
    """Open a folder that is this user's alone.

    Args:
        name: of the folder.
        parent: descriptor of the one that it is in.
        place: its path, for the message.
        make: it, if it is not there.

    Returns:
        Its descriptor.

    Raises:
        PermissionError: if it is a link, or others own it or can write to it.
        OSError: if it cannot be made or opened.
    """
    if make:
        with suppress(FileExistsError):
            os.mkdir(name, 0o700, dir_fd=parent)
    try:
        descriptor = os.open(name, _OPEN_FOLDER, dir_fd=parent)
    except NotADirectoryError as error:  # or a link, by O_NOFOLLOW
        raise PermissionError(f"{place} is not this user's own: it is not a folder") from error
    facts = os.fstat(descriptor)
    if facts.st_uid != os.geteuid() or facts.st_mode & 0o022:
        os.close(descriptor)
        raise PermissionError(
            f"{place} is not this user's own: it belongs to user {facts.st_uid}, and its mode is "
            f"{stat.S_IMODE(facts.st_mode):04o}"
        )
    if facts.st_mode & 0o055:
        os.fchmod(descriptor, 0o700)
    return descriptor


def new_private_folder(prefix: str, directory: str | Path | None = None) -> Path:
    """Make a folder that is this user's alone, under a name that nobody knows before.

    Args:
        prefix: of the name.
        directory: that it is to be in; None: the one for temporary files.

    Raises:
        OSError: if it cannot be made there.
    """
    import tempfile  # takes longer than all else that a watchdog imports

    real = require_stable(directory or tempfile.gettempdir())
    return Path(tempfile.mkdtemp(prefix=prefix, dir=real))


def open_directory(path: Path) -> int:
    """Return a descriptor of a directory.

    Raises:
        OSError: if it is none, but a link, or cannot be opened.
    """
    return os.open(path, _OPEN_FOLDER)


def names_in(folder: int) -> list[str]:
    """Return the names in a folder, given by its descriptor."""
    with os.scandir(folder) as entries:
        return [entry.name for entry in entries]


def _trusted_owners() -> set[int]:
    """Return who may own a folder above one of ours."""
    owners = {0, os.geteuid()}
    try:
        has_strangers = _UID_MAP.read_text(encoding="ascii").split() != ["0", "0", str(2**32 - 1)]
    except OSError:  # not Linux
        has_strangers = False
    return owners | ({_OVERFLOW_UID} if has_strangers else set())


def is_open_to_group(folder: Path) -> bool:
    """Tell whether a folder is one that its group writes to."""
    try:
        return folder.stat().st_mode & _IS_OPEN == _IS_OPEN
    except OSError:
        return False


def open_to_group(folder: Path) -> None:
    """Open a folder to its group.

    Raises:
        OSError: if that is not possible, such as for a folder of somebody else.
    """
    mode = stat.S_IMODE(folder.stat().st_mode)
    if mode & _GROUP_FOLDER != _GROUP_FOLDER:
        folder.chmod(mode | _GROUP_FOLDER)
    if not is_open_to_group(folder):
        # The bit is dropped where the group is not the user's, and where none are kept.
        raise OSError(errno.EPERM, "the setgid bit does not stay", str(folder))


def follow_folder(path: Path) -> None:
    """Open a new file or folder to the group, if the one that it is in is open."""
    if is_open_to_group(path.parent):
        _open_one(path)


def open_tree_to_group(folder: Path) -> None:
    """Open all that this user has in a folder, if it is open."""
    if is_open_to_group(folder):
        for place, folders, files in os.walk(folder):
            for name in (*folders, *files):
                _open_one(Path(place, name))


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


def _open_one(path: Path) -> None:
    with suppress(OSError):
        facts = path.lstat()
        wanted = _GROUP_FOLDER if stat.S_ISDIR(facts.st_mode) else _GROUP_FILE
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
