"""A run packed for a support desk: what shows how it went, and neither data nor weights.

A run folder may be of another user, in use, or damaged. What cannot be read is listed with the
reason; no link is followed, nothing but plain files is opened, and of long ones the end is taken.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import stat
import tarfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpctrain.errors import ConfigError, OutputError
from hpctrain.observe.redacting import redact
from hpctrain.utils.files import open_regular
from hpctrain.utils.permissions import explained
from hpctrain.utils.text import printable, size, table

MOST_BYTES = 4_500_000
"""Of all files together, not yet compressed: so the archive is below 5 MB whatever is in it."""

_LONG, _SHORT = 1_000_000, 50_000
_MOST_LISTED = 2000

# Folder, files in it, how many of the newest, bytes of each; what matters most comes first.
_PARTS = (
    ("", ("exit.json", ".exit.json.*", "lease.json", ".lease.json.*", "latest"), 20, _SHORT),
    ("", ("config.toml", "*.toml", "check*.json", "check*.txt"), 10, _SHORT),
    ("", ("crash-rank-*.json",), 20, _SHORT),
    ("", ("log.txt",), 1, _LONG),
    ("jobs", ("*.json",), 20, _SHORT),
    ("stacks", ("*",), 64, _SHORT),
    ("", ("metrics.jsonl",), 1, _SHORT),
    ("checkpoints/*", ("meta.json", "config.toml"), 2, _SHORT),
)
_LEFT_OUT_OF_RECORDS = ("diff", "_source")


@dataclass(frozen=True, slots=True)
class Item:
    """A file of a bundle, or why it is none.

    Attributes:
        name: in the run folder, escaped.
        content: None: left out.
        note: what was done to it.
    """

    name: str
    content: bytes | None
    note: str = ""


def bundle(run: Path, target: Path, *, status: str, more: tuple[Path, ...] = ()) -> list[str]:
    """Pack what shows how a run went.

    Args:
        run: its folder.
        target: the archive to write; it may not be there yet.
        status: of the run, in words.
        more: further files to pack, such as the log of a job script or the report of `check`.

    Returns:
        What is in it, a line for each file.

    Raises:
        ConfigError: if there is no such folder, or no run in it.
        OutputError: if the archive cannot be written.
    """
    try:
        folder = os.open(run, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise ConfigError(f"{run}: {explained(error, run)}") from error
    try:
        items = [*_items_of(folder), *(_more(path) for path in more)]
        if not any(item.content is not None for item in items):
            raise ConfigError(f"{run} holds no run: nothing in it can be read that is of one")
        listing = _listing(folder)
    finally:
        os.close(folder)
    items = _bounded(
        [Item("status.txt", redact(status)[0].encode()), *items, Item("files.txt", listing)]
    )
    lines = table([(_size(item), item.name, item.note) for item in items])
    contents = "\n".join(lines) + "\n"
    items.append(Item("CONTENTS.txt", contents.encode()))
    _write(target, printable(run.resolve().name) or "run", items)
    return lines


def _size(item: Item) -> str:
    return "left out" if item.content is None else size(len(item.content))


def _items_of(folder: int) -> Iterator[Item]:
    seen = set()
    for place, patterns, most, most_bytes in _PARTS:
        for name, descriptor in _folders(folder, place):
            try:
                found = _newest(descriptor, patterns)
                for file in found[:most]:
                    path = f"{name}/{file}" if name else file
                    if path not in seen:
                        seen.add(path)
                        yield _item(descriptor, file, path, most_bytes)
                if found[most:]:
                    yield Item(printable(f"{name or '.'}/"), None, f"{len(found) - most} older")
            except OSError as error:
                yield Item(printable(f"{name or '.'}/"), None, error.strerror or str(error))
            finally:
                os.close(descriptor)


def _folders(folder: int, place: str) -> Iterator[tuple[str, int]]:
    """Yield name and descriptor of a folder below another; of "a/*" the newest one."""
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
    outer, _, inner = place.partition("/")
    try:
        descriptor = os.dup(folder) if not outer else os.open(outer, flags, dir_fd=folder)
    except OSError:
        return
    if not inner:
        yield outer, descriptor
        return
    try:
        with suppress(OSError):
            names = sorted(name for name in _names(descriptor) if name.startswith("step-"))
            if names:
                yield f"{outer}/{names[-1]}", os.open(names[-1], flags, dir_fd=descriptor)
    finally:
        os.close(descriptor)


def _names(folder: int) -> list[str]:
    with os.scandir(folder) as entries:
        return [entry.name for entry in entries]


def _newest(folder: int, patterns: tuple[str, ...]) -> list[str]:
    """Return the names in a folder that fit, the newest first."""
    times = {}
    for name in _names(folder):
        if any(Path(name).match(pattern) for pattern in patterns):
            with suppress(OSError):
                times[name] = os.lstat(name, dir_fd=folder).st_mtime
    return sorted(times, key=lambda name: (-times[name], name))


def _item(folder: int | None, name: str, path: str, most_bytes: int) -> Item:
    """Return a file as it goes into the archive: its end, as text, without secrets."""
    shown = printable(path)
    try:
        # A link in the run folder may lead anywhere; what the user names is taken as it is.
        descriptor = open_regular(name, follow_links=folder is None, folder=folder)
        with os.fdopen(descriptor, "rb") as file:
            facts = os.fstat(descriptor)
            start = max(0, facts.st_size - most_bytes)
            file.seek(start)
            content = file.read(most_bytes)
    except OSError as error:
        return Item(shown, None, str(error.strerror))
    notes = [f"the last {size(len(content))} of {size(facts.st_size)}"] if start else []
    if start:  # no half of a line, in which half a secret would not be known for one
        content = content.partition(b"\n")[2]
    if b"\0" in content:
        return Item(shown, None, "not text")
    text = content.decode("utf-8", errors="backslashreplace")
    if path.startswith("jobs/") and not start:
        text = _without_code(text)
    text, secrets = redact(text)
    if secrets:
        notes.append(f"{secrets} redacted")
    return Item(shown, text.encode(), ", ".join(notes))


def _without_code(text: str) -> str:
    """Return the record of a job without how the user's code differs from its commit."""
    try:
        record: Any = json.loads(text)
    except (ValueError, RecursionError):
        return text
    waiting = [record]
    while waiting:
        value = waiting.pop()
        if isinstance(value, list):
            waiting += value
        elif isinstance(value, dict):
            for key in _LEFT_OUT_OF_RECORDS:
                if isinstance(value.get(key), str) and value[key]:
                    value[key] = f"[left out: {len(value[key]):,} characters]"
            waiting += value.values()
    return json.dumps(record, indent=1)


def _more(path: Path) -> Item:
    item = _item(None, str(path), f"more/{path.name}", _LONG)
    if item.content is None:
        raise ConfigError(f"{path} cannot be packed: {item.note}")
    return item


def _listing(folder: int) -> bytes:
    """Return the names, sizes, modes and owners of what lies in a run folder."""
    rows = []
    with suppress(OSError):
        for name in sorted(_names(folder)):
            with suppress(OSError):
                facts = os.lstat(name, dir_fd=folder)
                mode, owner = stat.filemode(facts.st_mode), f"{facts.st_uid}:{facts.st_gid}"
                rows.append((mode, owner, str(facts.st_size), printable(name)))
    rows = rows[:_MOST_LISTED] or [("nothing", "", "", "")]
    return ("\n".join(table(rows)) + "\n").encode()


def _bounded(items: list[Item]) -> list[Item]:
    """Return the items without those that there is no room for."""
    left, bounded = MOST_BYTES, []
    for item in items:
        length = len(item.content or b"")
        if length > left:
            bounded.append(Item(item.name, None, f"no room for {size(length)}"))
            continue
        left -= length
        bounded.append(item)
    return bounded


def _write(target: Path, name: str, items: list[Item]) -> None:
    """Write the archive, for its owner alone: who gets it is for them to say."""
    try:
        descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        try:
            with (
                os.fdopen(descriptor, "wb") as file,
                gzip.GzipFile("", "wb", fileobj=file) as packed,
                tarfile.open(fileobj=packed, mode="w|") as archive,
            ):
                for item in items:
                    if item.content is not None:
                        facts = tarfile.TarInfo(f"{name}/{item.name}")
                        facts.size = len(item.content)
                        archive.addfile(facts, io.BytesIO(item.content))
        except BaseException:
            target.unlink()
            raise
    except OSError as error:
        raise OutputError(f"cannot write {target}: {error.strerror}") from error
