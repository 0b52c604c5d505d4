"""The text of a config: a TOML file to a table."""

from __future__ import annotations

import dataclasses
import functools
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hpctrain.config.lines import deepest_line, locate_keys
from hpctrain.config.messages import NOT_GIVEN, KeyPath, Mistake, config_error
from hpctrain.errors import ConfigError
from hpctrain.utils.files import open_file
from hpctrain.utils.text import did_you_mean, printable

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Table = dict[str, Any]

DEEPEST = 16
"""Levels of tables and lists that a config may have; everything behind may then recurse."""

_LARGEST_BYTES = 1_000_000
"""Beyond this it is no config but, say, a shard: not to be read whole on a login node."""


@dataclass(kw_only=True)
class Source:
    """A parsed config, and where each of its keys comes from.

    Attributes:
        path: of the file, for the messages.
        text: of the file, its lines ended by a line feed.
        table: of tables, by section; overrides are applied to it.
        overrides: position on the command line of every key that was overridden.
    """

    path: str
    text: str
    table: Table
    overrides: dict[KeyPath, int] = field(default_factory=dict)

    @functools.cached_property
    def lines(self) -> dict[KeyPath, int]:
        """Line number of every key of the file, sections included."""
        return locate_keys(self.text)

    def get(self, *key: str) -> Any:
        """Return a value as given, None if it or a table on the way to it is not there."""
        value = self._find(key)
        return None if value is NOT_GIVEN else value

    def mistake(self, key: KeyPath, problem: str) -> Mistake:
        """Return a mistake at a key, with its value and its place."""
        return self.place(Mistake(key=key, problem=problem, value=self._find(key)))

    def place(self, mistake: Mistake) -> Mistake:
        """Return a mistake with the place of its key, or of the table that it would stand in."""
        line, override = self._place(mistake.key)
        value = mistake.value
        if len(mistake.key) == 1 and isinstance(value, dict):
            value = NOT_GIVEN  # a section is known by its name
        return dataclasses.replace(mistake, value=value, line=line, override=override)

    def _place(self, key: KeyPath) -> tuple[int | None, int | None]:
        """Return the line, or else the override, that a key comes from."""
        elsewhere = (*key[:1], "arguments", *key[1:])  # where a component's keys may also stand
        for end in range(len(key) + 1, 0, -1):
            for path in (key[:end], elsewhere[:end]):
                if path in self.overrides:
                    return None, self.overrides[path]
                if path in self.lines:
                    return self.lines[path], None
        inside = (number for path, number in self.overrides.items() if path[: len(key)] == key)
        return None, next(inside, None)

    def _find(self, key: KeyPath) -> Any:
        value: Any = self.table
        for part in key:
            if not isinstance(value, dict) or part not in value:
                return NOT_GIVEN
            value = value[part]
        return value


def read(path: str) -> Source:
    """Read and parse a config file.

    Raises:
        ConfigError: if it cannot be read or is no TOML, with line and column.
    """
    name = printable(path)
    try:
        with open_file(path) as file:
            data = file.read(_LARGEST_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError(f"{name}: no such file{_neighbour(path)}") from None
    except IsADirectoryError:
        raise ConfigError(f"{name}: is a folder; name the TOML file in it") from None
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"{name}: cannot be read: {reason}") from None
    if len(data) > _LARGEST_BYTES:
        raise ConfigError(f"{name}: larger than {_LARGEST_BYTES:,} bytes: is this a config?")
    try:
        text = data.decode("utf-8-sig")  # some editors begin a file with a byte order mark
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ConfigError(f"{name}, line {line}: not UTF-8, which TOML has to be") from None
    return parse(text, path)


def parse(text: str, path: str) -> Source:
    """Parse the text of a config; `path` is for the messages.

    Raises:
        ConfigError: if it is no TOML, with line and column.
    """
    name = printable(path)
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{name}{_syntax_error(str(error), text)}") from None
    except RecursionError:
        line = deepest_line(text)
        raise ConfigError(f"{name}, line {line}: nested too deeply to be read") from None
    except ValueError:  # the one other way to fail: more digits than Python makes an integer of
        digits = re.search(r"\d[\d_]{999}", text)
        line = text.count("\n", 0, digits.start() if digits else 0) + 1
        raise ConfigError(f"{name}, line {line}: a number of thousands of digits") from None
    return Source(path=path, text=text.replace("\r\n", "\n"), table=table)


def refuse_depth(source: Source) -> None:
    """Refuse a table that what comes after could not walk through by recursion.

    Raises:
        ConfigError: with the first key that lies too deep.
    """
    level: list[tuple[KeyPath, Any]] = [((), source.table)]
    for _ in range(DEEPEST):
        level = [
            (path if isinstance(value, list) else (*path, name), inner)
            for path, value in level
            for name, inner in _items(value)
        ]
    for path, value in level:
        if isinstance(value, dict | list):
            problem = f"nested more than {DEEPEST} levels deep"
            mistake = source.place(Mistake(key=path, problem=problem))
            raise config_error(source.path, [mistake])


def _items(value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        return list(value.items())
    return [("", item) for item in value] if isinstance(value, list) else []


def _syntax_error(message: str, text: str) -> str:
    """Return where and why, from the parser's "... (at line 3, column 9)", and the line itself."""
    place = re.search(r"\s*\(at (?:line (\d+), column (\d+)|end of document)\)$", message)
    if place is None:
        return f": not TOML: {printable(message)}"
    # A table is named there as a Python tuple.
    tables = re.sub(r"\('(.*?)',?\)", r"[\1]", message[: place.start()]).replace("', '", ".")
    reason = printable(tables[:100])
    lines = text.replace("\r\n", "\n").split("\n")
    if place[1] is None:
        where = f"line {len(lines)}, column {len(lines[-1]) + 1} (the end of the file)"
        line = lines[-1]
    else:
        where = f"line {place[1]}, column {place[2]}"
        line = lines[int(place[1]) - 1]
    return f", {where}: not TOML: {reason}\n  {printable(line[:100])}".rstrip()


def _neighbour(path: str) -> str:
    """Suggest a file beside the one that is not there."""
    wanted = Path(path)
    try:
        names = [item.name for item in wanted.parent.iterdir() if item.suffix == ".toml"]
    except (OSError, ValueError):
        return ""
    folder = "" if str(wanted.parent) == "." else f"{printable(str(wanted.parent))}/"
    return did_you_mean(wanted.name, names, prefix=folder)
