"""The text of a config: TOML to a table, and the line of every key; overrides on top."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hpctrain.config.messages import Mistake, did_you_mean, printable
from hpctrain.errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Table = dict[str, Any]
KeyPath = tuple[str, ...]

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")


@dataclass(slots=True)
class Source:
    """A parsed config and where each of its keys comes from.

    Attributes:
        table: of tables, by section.
        lines: line number of every key, sections included.
        overrides: the override, as given, of every key that has one.
    """

    table: Table
    lines: dict[KeyPath, int] = field(default_factory=dict)
    overrides: dict[KeyPath, str] = field(default_factory=dict)

    def mistake(self, key: KeyPath, text: str) -> Mistake:
        """Return a mistake with the place of `key`, or of what it would stand in."""
        for end in range(len(key), 0, -1):
            if key[:end] in self.overrides:
                return Mistake(key=".".join(key), text=text, override=self.overrides[key[:end]])
            if key[:end] in self.lines:
                return Mistake(key=".".join(key), text=text, line=self.lines[key[:end]])
        return Mistake(key=".".join(key), text=text)

    def get(self, section: str, key: str) -> Any:
        """Return a value as given, None if it is not there or its section is no table."""
        table = self.table.get(section)
        return table.get(key) if isinstance(table, dict) else None


def read(path: str) -> Source:
    """Read and parse a config file.

    Raises:
        ConfigError: if it cannot be read or is no TOML, with line and column.
    """
    name = printable(path)
    try:
        text = Path(path).read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{name}: no such file{_neighbour(path)}") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ConfigError(f"{name}, line {line}: not UTF-8, as TOML has to be") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"{name}: cannot be read: {reason}") from None
    return parse(text, path)


def parse(text: str, path: str) -> Source:
    """Parse the text of a config; `path` is for the messages.

    Raises:
        ConfigError: if it is no TOML, with line and column.
    """
    name = printable(path)
    # Line ends as TOML knows them, so that the lines counted here are an editor's.
    text = text.replace("\r\n", "\n")
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{name}{_syntax_error(str(error), text)}") from None
    except RecursionError:
        raise ConfigError(f"{name}: nested too deeply to be read") from None
    except ValueError as error:  # an integer of more digits than Python converts
        raise ConfigError(f"{name}: {printable(str(error))}") from None
    return Source(table, locate_keys(text))


def locate_keys(text: str) -> dict[KeyPath, int]:
    """Return the line of every key of a valid TOML text.

    TOML is a sequence of statements, each at the start of a line: `[header]` or `key = value`,
    where only a value may go on over further lines. So lines are gathered until they parse alone.
    """
    lines: dict[KeyPath, int] = {}
    section: KeyPath = ()
    statement, first = "", 0
    for number, line in enumerate(text.split("\n"), start=1):
        if not statement:
            if not line.strip() or line.lstrip().startswith("#"):
                continue
            first = number
        statement += line + "\n"
        try:
            parsed = tomllib.loads(statement)
        except (tomllib.TOMLDecodeError, RecursionError):
            continue
        header = statement.lstrip().startswith("[")
        paths = _paths(parsed)
        if header:
            section = max(paths, key=len, default=())
        for path in paths:
            lines.setdefault(path if header else (*section, *path), first)
        statement = ""
    return lines


def apply_overrides(source: Source, overrides: Sequence[str]) -> list[Mistake]:
    """Set single keys, each given as section.key=VALUE with a TOML value.

    A bare word that is no TOML value is taken as a string, so that names need no quotes within
    the shell's.
    """
    mistakes = []
    for override in overrides:
        name, equals, text = override.partition("=")
        path = tuple(name.strip().split("."))
        if not equals or len(path) < 2 or not all(_BARE_KEY.fullmatch(part) for part in path):
            mistakes.append(Mistake(key="", text="expected SECTION.KEY=VALUE", override=override))
            continue
        try:
            value = _override_value(text.strip())
        except ValueError as error:
            mistakes.append(Mistake(key=name, text=f": {error}", override=override))
            continue
        table = source.table
        for depth, part in enumerate(path[:-1], start=1):
            inner = table.setdefault(part, {})
            if not isinstance(inner, dict):
                text = f": {'.'.join(path[:depth])} is no table"
                mistakes.append(Mistake(key=name, text=text, override=override))
                break
            table = inner
        else:
            table[path[-1]] = value
            source.overrides[path] = override
    return mistakes


def _override_value(text: str) -> Any:
    try:
        if "\n" in text:
            raise ValueError("more than one line")
        return tomllib.loads(f"value = {text}")["value"]
    except (RecursionError, ValueError):  # a TOMLDecodeError is a ValueError
        if not text or text[0] in "[{\"'" or "\n" in text:
            raise ValueError(f"no TOML value: {printable(text) or 'nothing after ='}") from None
        return text


def _paths(table: Table, prefix: KeyPath = ()) -> list[KeyPath]:
    """Return the paths of all keys of a parsed statement, tables inside it included."""
    paths: list[KeyPath] = []
    for key, value in table.items():
        path = (*prefix, key)
        paths.append(path)
        inner = value[-1] if isinstance(value, list) and value else value
        if isinstance(inner, dict):
            paths += _paths(inner, path)
    return paths


def _syntax_error(message: str, text: str) -> str:
    place = re.search(r"\s*\(at (?:line (\d+), column (\d+)|end of document)\)$", message)
    if place is None:
        return f": not TOML: {printable(message)}"
    reason = printable(message[: place.start()])
    if place[1] is None:
        return f", line {text.count(chr(10)) + 1} (its end): not TOML: {reason}"
    line = text.split("\n")[int(place[1]) - 1]
    return f", line {place[1]}, column {place[2]}: not TOML: {reason}\n  {printable(line)[:100]}"


def _neighbour(path: str) -> str:
    """Suggest a file beside the one that is not there."""
    try:
        names = [str(item) for item in Path(path).parent.iterdir() if item.suffix == ".toml"]
    except (OSError, ValueError):
        return ""
    return did_you_mean(path, names)
