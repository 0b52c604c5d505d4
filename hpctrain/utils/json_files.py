"""JSON that hpctrain has written, read with distrust: disks, editors and other programs alter it.

Whatever a file holds ends in a value of the right types or in an OSError or ValueError, which say
in a line what is wrong and where; the caller adds whose file it is and what to do.
"""

from __future__ import annotations

import functools
import json
import re
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from hpctrain.utils.files import open_file
from hpctrain.utils.text import printable

if TYPE_CHECKING:
    from pydantic import TypeAdapter

T = TypeVar("T")

SMALL = 2**20
"""Bytes of a file of a few values, at most."""
LARGE = 2**29
"""Bytes of a list of very many files or tensors, at most: a million shards.

Parsed it takes up to 30 times as much memory.
"""

_SHOWN_CHARACTERS = 60
_NAME_BYTES = 4096
_SUSPICIOUS = re.compile(rb"\\u(0000|[dD][89a-fA-F])")


def read_whole(path: Path, most_bytes: int) -> bytes:
    """Return the content of a file of ours.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is not a regular file, or larger than any of its kind.
    """
    size = require_file(path, most_bytes)
    with open_file(path) as file:
        content = file.read(size + 1)  # takes memory for all that is asked for, there or not
        if len(content) > size:
            content += file.read(most_bytes - size)
    if len(content) > most_bytes:
        raise ValueError(f"it has grown to more than {most_bytes:,} bytes")
    return content


def require_file(path: Path, most_bytes: int) -> int:
    """Return the size of a file of ours: no pipe, which would keep a reader waiting for ever.

    Raises:
        OSError: if it cannot be looked at.
        ValueError: if it is not a regular file, or larger than any of its kind.
    """
    facts = path.stat()
    if not stat.S_ISREG(facts.st_mode):
        raise ValueError("it is not a regular file")
    if facts.st_size > most_bytes:
        raise ValueError(f"it has {facts.st_size:,} bytes, and no more than {most_bytes:,} fit")
    return facts.st_size


def parse_json(content: bytes) -> Any:
    """Return what JSON says, unchecked. Standard library only.

    Raises:
        ValueError: if it is no JSON, or holds text that is none.
    """
    try:
        document = json.loads(content.decode("utf-8"))
    except RecursionError as error:
        raise ValueError("it is not JSON of ours: nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"it is not JSON: {_shortened(error)}") from error
    if _SUSPICIOUS.search(content):
        _require_text(document)
    return document


def parse_checked(content: bytes, kind: type[T]) -> T:
    """Return what JSON says as a value of a type: a dataclass, a table of them, ...

    Types are held strictly: no number is taken from text, and no true or false for a number. Keys
    that the type does not know are left out, for they may be of a later version.

    Raises:
        ValueError: if it is no JSON, or of other types; it names the first place.
    """
    from pydantic import ValidationError

    try:
        value: T = _adapter(cast("Any", kind)).validate_json(content, strict=True)
    except ValidationError as error:
        raise ValueError(_words(error.errors(include_url=False)[0])) from error
    if _SUSPICIOUS.search(content):
        parse_json(content)
    return value


def checked(document: object, kind: type[T]) -> T:
    """Return parsed JSON as a value of a type, see `parse_checked`.

    Raises:
        ValueError: if it is of other types; it names the first place.
    """
    return parse_checked(json.dumps(document).encode(), kind)


def read_checked(path: Path, kind: type[T], most_bytes: int = SMALL) -> T:
    """Return what a file of JSON says as a value of a type, see `parse_checked`.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is no JSON, or of other types; it names the first place.
    """
    return parse_checked(read_whole(path, most_bytes), kind)


def read_name(path: Path) -> str:
    """Return the name that a file of one line holds.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it holds no plain name of a file.
    """
    content = read_whole(path, _NAME_BYTES)
    try:
        name = content.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise ValueError("it is not text in UTF-8") from error
    if not name.isprintable() or "/" in name or name in ("", ".", ".."):
        raise ValueError(f"it holds no name: {_shortened(repr(name))}")
    return name


def _require_text(document: object) -> None:
    """Refuse characters that are valid in JSON, but can neither be printed nor name a file."""
    waiting = [document]
    while waiting:
        item = waiting.pop()
        if isinstance(item, dict):
            waiting += item.keys()
            waiting += item.values()
        elif isinstance(item, list):
            waiting += item
        elif isinstance(item, str) and re.search("[\0\ud800-\udfff]", item):
            raise ValueError(f"it holds text that is none: {_shortened(item)}")


@functools.lru_cache(maxsize=32)
def _adapter(kind: Any) -> TypeAdapter[Any]:
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def _words(problem: Any) -> str:
    """Return the first thing that pydantic found wrong, in a line."""
    if problem["type"] == "json_invalid":
        return f"it is not JSON of ours: {_shortened(problem['ctx']['error'])}"
    place = ".".join(str(part) for part in problem["loc"]) or "the document"
    if problem["type"] == "missing":
        return f"{_shortened(place)} is missing"
    wanted = problem["msg"].removeprefix("Input ").replace("should be", "is not")
    return f"{_shortened(place)}: {_shortened(repr(problem['input']))} {wanted}"


def _shortened(what: object) -> str:
    text = printable(str(what)[: _SHOWN_CHARACTERS + 1])
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 3] + "..."
