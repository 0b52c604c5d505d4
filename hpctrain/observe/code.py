"""The user's own code in this process: modules, their files, and what git knows of them.

A job must not wait for git, nor fail by it: it may be absent, hang on a slow file system, or refuse
a repository of another user, in whose settings it would find commands to execute.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Timer

from hpctrain.utils.files import file_checksum
from hpctrain.utils.text import listed

Modules = Mapping[str, Mapping[str, str]]
"""By name: "file", as seen from the current directory, and "xxh3", hexadecimal."""

MOST_DIFF_BYTES = 1_000_000

LIMIT_SECONDS = 20.0
"""For all that git is asked about one repository."""

_INSTALLED = {"site-packages", "dist-packages"}

_MOST_MODULES = 2000

_OURS = Path(__file__).resolve().parents[1]

_SHOWN = 4

_MOST_UNTRACKED = 100

_COMMIT = re.compile(r"[0-9a-f]{40}([0-9a-f]{24})?")

_QUIET = {
    "GIT_OPTIONAL_LOCKS": "0",  # others work in the repository meanwhile
    "GIT_TERMINAL_PROMPT": "0",
    "GIT_ASKPASS": "true",
    "GIT_PAGER": "cat",
    "LC_ALL": "C.UTF-8",
}

_OF_ANOTHER_REPOSITORY = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_PREFIX")


def user_modules() -> dict[str, Path]:
    """Return the files of imported modules that belong to no package, to Python or to hpctrain."""
    return dict(_user_modules())


def _user_modules() -> Iterator[tuple[str, Path]]:
    kinds = ("stdlib", "platstdlib", "purelib", "platlib")
    named = {str(_OURS), *(sysconfig.get_path(kind) for kind in kinds)}
    others = {os.path.realpath(folder) for folder in named}
    beginnings = tuple(folder + os.sep for folder in named | others)
    installed = [f"{os.sep}{folder}{os.sep}" for folder in _INSTALLED]
    for name, module in sorted(sys.modules.copy().items()):
        # Not by getattr: a module that loads itself when it is first used would do so.
        file = getattr(module, "__dict__", {}).get("__file__")
        if not isinstance(file, str) or not file or name == "__mp_main__":  # main's other name
            continue
        # Thousands are known by their names; links are followed, name by name, for the rest.
        if file.startswith(beginnings) or any(folder in file for folder in installed):
            continue
        path = Path(os.path.realpath(file))
        if _INSTALLED.isdisjoint(path.parts) and others.isdisjoint(map(str, path.parents)):
            yield name, path


def modules_now() -> dict[str, dict[str, str]]:
    """Return the user's modules as their files are now; what cannot be read is left out."""
    here, found = Path.cwd(), {}
    for name, path in list(user_modules().items())[:_MOST_MODULES]:
        try:
            digest = file_checksum(path)
        except OSError:  # as of a module in an archive
            continue
        file = path.relative_to(here) if path.is_relative_to(here) else path
        found[name] = {"file": str(file), "xxh3": digest}
    return found


def module_changes(then: Modules, now: Modules, step: int) -> list[str]:
    """Return how the user's modules differ from those of the job that saved a step.

    A module that only one of the two has imported is listed too: it may do what another did before.
    """
    changed = [now[name]["file"] for name in now if name in then and _differs(then, now, name)]
    lines = {
        "changed": changed,
        "now imported, and not": [now[name]["file"] for name in now.keys() - then.keys()],
        "no longer imported, as": [then[name]["file"] for name in then.keys() - now.keys()],
    }
    ends = (f"since step {step:,}", f"at step {step:,}", f"at step {step:,}")
    return [
        f"code: {listed(sorted(files), _SHOWN)} {word} {end}"
        for (word, files), end in zip(lines.items(), ends, strict=True)
        if files
    ]


def _differs(then: Modules, now: Modules, name: str) -> bool:
    return then[name]["xxh3"] != now[name]["xxh3"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Repository:
    """A repository as a job found it.

    Attributes:
        root: its folder.
        commit: that is checked out; None: there is none yet, or it cannot be found out.
        dirty: whether files that git knows differ from it; None: unknown.
        diff: how they differ, as `git apply` takes it.
        diff_is_cut: there is more of it than is kept.
        untracked: files and folders that git does not know and does not ignore.
        note: why something is unknown.
    """

    root: str
    commit: str | None = None
    dirty: bool | None = None
    diff: str = ""
    diff_is_cut: bool = False
    untracked: Sequence[str] = field(default_factory=list)
    note: str | None = None


def root_of(path: Path) -> Path | None:
    """Return the folder of the repository that a file or folder is in, None if it is in none."""
    for folder in (path, *path.parents):
        with suppress(OSError):
            if (folder / ".git").exists():
                return folder
    return None


def repository_at(root: Path, limit_seconds: float = LIMIT_SECONDS) -> Repository:
    """Return what a repository is like now; it never takes much longer than the limit."""
    commit = _commit_by_hand(root)
    try:
        owner = (root / ".git").stat().st_uid
        if owner != os.geteuid():
            raise _NoAnswerError(f"it belongs to user {owner}: git is not asked about the files")
        end = time.monotonic() + limit_seconds
        status = _git(root, end, "status", "--porcelain=v1", "-z", "--untracked-files=normal")
        entries = [entry for entry in status.decode(errors="replace").split("\0") if entry[3:]]
        untracked = [entry[3:] for entry in entries if entry.startswith("??")]
        dirty = len(untracked) < len(entries)
        diff = b""
        if dirty and commit is not None:
            options = ("--no-ext-diff", "--no-textconv", "--no-color", "--submodule=diff")
            diff = _git(root, end, "diff", "HEAD", *options, most_bytes=MOST_DIFF_BYTES)
    except _NoAnswerError as reason:
        return Repository(root=str(root), commit=commit, note=str(reason))
    return Repository(
        root=str(root),
        commit=commit,
        dirty=dirty,
        diff=diff.decode(errors="replace"),
        diff_is_cut=len(diff) >= MOST_DIFF_BYTES,
        untracked=untracked[:_MOST_UNTRACKED],
    )


class _NoAnswerError(Exception):
    """Git has not answered, and why."""


def _git(root: Path, end: float, *arguments: str, most_bytes: int = 2**24) -> bytes:
    """Return the first bytes of what a git command prints, before the clock shows `end`.

    Raises:
        _NoAnswerError: if it fails, takes too long or is not there.
    """
    environment: Mapping[str, str] = {
        **{key: value for key, value in os.environ.items() if key not in _OF_ANOTHER_REPOSITORY},
        **_QUIET,
    }
    # A monitor of the file system would stay behind as a process of the job.
    command = ["git", "-C", str(root), "-c", "core.fsmonitor=false", *arguments]
    try:
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # with it end the programs that it starts, such as filters
        )
    except OSError as error:
        raise _NoAnswerError(f"git cannot be started: {error.strerror}") from error
    assert process.stdout is not None
    timer = Timer(max(0.0, end - time.monotonic()), _kill, (process,))
    timer.daemon = True
    timer.start()
    with process.stdout as output:
        found = output.read(most_bytes)
        whole = len(found) < most_bytes
    timer.cancel()
    if not whole:
        _kill(process)
    try:
        code = process.wait(timeout=1.0)
    except subprocess.TimeoutExpired:
        raise _NoAnswerError("git does not end: the file system may hang") from None
    if time.monotonic() >= end:
        raise _NoAnswerError(f"git {arguments[0]} took too long")
    if whole and code:
        raise _NoAnswerError(f"git {arguments[0]} failed with code {code}")
    return found


def _kill(process: subprocess.Popen[bytes]) -> None:
    with suppress(OSError):
        os.killpg(process.pid, signal.SIGKILL)


def _commit_by_hand(root: Path) -> str | None:
    """Return the commit that is checked out, as git's own files say it."""
    try:
        git = root / ".git"
        if git.is_file():  # of a submodule or a further working tree
            git = root / git.read_text(encoding="utf-8").removeprefix("gitdir:").strip()
        head = (git / "HEAD").read_text(encoding="utf-8").strip()
        if head.startswith("ref:"):
            head = _commit_of(git, head.removeprefix("ref:").strip())
    except (OSError, UnicodeDecodeError, ValueError):
        return None
    return head if _COMMIT.fullmatch(head) else None


def _commit_of(git: Path, reference: str) -> str:
    """Return what a branch stands for; "" if nothing does."""
    common = git
    with suppress(OSError):
        common = git / (git / "commondir").read_text(encoding="utf-8").strip()
    for folder in (git, common):
        with suppress(OSError):
            return (folder / reference).read_text(encoding="utf-8").strip()
    with suppress(OSError):
        for line in (common / "packed-refs").read_text(encoding="utf-8").splitlines():
            commit, _, name = line.partition(" ")
            if name == reference:
                return commit
    return ""
