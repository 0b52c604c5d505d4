"""TOML to a table that knows the line of every key, and overrides on top of it."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hpctrain.config.foreign_keys import instead_of
from hpctrain.config.messages import (
    NOT_GIVEN,
    KeyPath,
    Mistake,
    Verbatim,
    config_error,
    reason_of,
    shown,
)
from hpctrain.errors import ConfigError
from hpctrain.utils.files import open_file
from hpctrain.utils.text import did_you_mean, listed, printable

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Table = dict[str, Any]

DEEPEST = 16
"""Levels of tables and lists that a config may have; everything behind may then recurse."""

_LARGEST_BYTES = 1_000_000
"""Beyond this it is no config but, say, a shard: not to be read whole on a login node."""

_KEY = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)+")

_TOKEN = re.compile(
    r'''
      """ (?: \\. | [^\\] )*? "{3,5}      # long strings first; up to two quotes belong to them
    | \'\'\' .*? '{3,5}
    | " (?: \\. | [^"\\\n] )* "
    | ' [^'\n]* '
    | \# [^\n]*
    | (?P<open> [\[{] )
    | (?P<close> [\]}] )
    | (?P<end> \n )
    ''',
    re.VERBOSE | re.DOTALL,
)

_ITEM = re.compile(
    r"""
      " (?: \\. | [^\\"\n] )* "
    | ' [^'\n]* '
    | (?P<open> [\[{] )
    | (?P<close> [\]}] )
    | (?P<comma> , )
    """,
    re.VERBOSE,
)
"""What matters in a list of values in one line."""


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
        raise ConfigError(f"{name}: is a directory; name the TOML file in it") from None
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise ConfigError(f"{name}: cannot be read: {reason_of(error)}") from None
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
    hint = _meant(line[int(place[2]) - 1 :]) if place[1] is not None else ""
    return f", {where}: not TOML: {reason}{hint}\n  {printable(line[:100])}".rstrip()


def _meant(rest: str) -> str:
    """Return what TOML has in place of what a line goes on with, where others write it so."""
    word = re.match(r"[\w.+-]*", rest)
    text = word[0] if word else ""
    if text in ("True", "False"):
        return f"; did you mean {text.lower()}?"
    if text in ("None", "null", "nil", "~"):
        return "; TOML has no null: leave the key out"
    if re.fullmatch(r"[+-]?\.\d+", text):
        return "; a number has digits on both sides of its point"
    return "; a string needs quotes" if re.match(r"[A-Za-z/~$\u201c\u2018]", rest) else ""


def _neighbour(path: str) -> str:
    """Tell where a file is not, as the current directory is often another, and what is there."""
    wanted = Path(path)
    where = printable(str(wanted.parent.absolute()))
    try:
        names = sorted(item.name for item in wanted.parent.iterdir() if item.suffix == ".toml")
    except FileNotFoundError:
        return f", nor the folder {where}"
    except (OSError, ValueError):
        return ""
    folder = "" if str(wanted.parent) == "." else f"{printable(str(wanted.parent))}/"
    near = did_you_mean(wanted.name, [printable(name) for name in names], prefix=folder)
    others = listed([printable(name) for name in names]) if names else "no TOML file"
    return f" in {where}{near or f', which has {others}'}"


def locate_keys(text: str) -> dict[KeyPath, int]:
    """Return the line, from 1, on which each key of a valid TOML text first stands."""
    lines: dict[KeyPath, int] = {}
    section: KeyPath = ()
    for line, statement in _statements(text):
        try:
            parsed = tomllib.loads(statement)
        except (ValueError, RecursionError):
            continue  # parsed as part of the text, not alone: at the edge of what can be nested
        paths = list(_paths(parsed))
        if statement.startswith("["):
            section = max(paths, key=len)
            found = paths
        else:
            found = [(*section, *path) for path in paths]
        for path in found:
            lines.setdefault(path, line)
    return lines


def deepest_line(text: str) -> int:
    """Return the line on which brackets are nested most deeply."""
    deepest, line_of_deepest, depth, line, counted = 0, 1, 0, 1, 0
    for token in _TOKEN.finditer(text):
        depth += (token["open"] is not None) - (token["close"] is not None)
        if depth > deepest:
            line += text.count("\n", counted, token.start())
            counted = token.start()
            deepest, line_of_deepest = depth, line
    return line_of_deepest


def _statements(text: str) -> Iterator[tuple[int, str]]:
    """Yield every statement of a valid TOML text with its line; comments are none."""
    depth, start, line = 0, 0, 1
    for token in _TOKEN.finditer(text + "\n"):
        if token["open"]:
            depth += 1
        elif token["close"]:
            depth -= 1
        elif token["end"] and depth == 0:
            statement = text[start : token.start()].strip(" \t")
            if statement and not statement.startswith("#"):
                yield line, statement
            line += text.count("\n", start, token.end())
            start = token.end()


def _paths(table: dict[str, Any]) -> Iterator[KeyPath]:
    """Yield the path of every key of a parsed statement, those of tables inside it included."""
    rest: list[tuple[KeyPath, Any]] = [((), table)]
    while rest:
        prefix, value = rest.pop()
        for key, inner in value.items():
            path = (*prefix, key)
            yield path
            if isinstance(inner, list) and inner:
                inner = inner[-1]  # noqa: PLW2901 - `[[header]]` opens the last table of a list
            if isinstance(inner, dict):
                rest.append((path, inner))


def apply_overrides(source: Source, overrides: Sequence[str]) -> list[Mistake]:
    """Set the keys in the source's table; the last of several for the same key counts.

    A word that is no TOML value is taken as a string, so that names and paths need no quotes
    inside those of the shell.

    Returns:
        What could not be set; the other overrides are applied.
    """
    mistakes = []
    for position, override in enumerate(overrides):
        problem = _apply(source, override, position)
        if problem is not None:
            given = Verbatim(override)
            mistakes.append(Mistake(key=(), value=given, problem=problem, override=position))
    return mistakes


def _apply(source: Source, override: str, position: int) -> str | None:
    """Set one key; return why not, if not."""
    name, equals, text = override.partition("=")
    name = name.strip()
    if any("\ud800" <= char <= "\udfff" for char in override):
        return "not UTF-8, which TOML has to be"  # bytes of a command line in another encoding
    key = _key_of(name)
    if not equals or len(key) < 2:
        home = instead_of("", name) if equals and key else None
        return f"expected SECTION.KEY=VALUE{f'; {home}' if home else ''}"
    if len(key) > DEEPEST:
        return f"nested more than {DEEPEST} levels deep"
    try:
        value = parse_value(text.strip())
    except ValueError as error:
        return str(error)
    table = source.table
    for depth, part in enumerate(key[:-1], start=1):
        inner = table.setdefault(part, {})
        if not isinstance(inner, dict):
            return f"{'.'.join(key[:depth])} is {shown(inner)}, which has no keys"
        table = inner
    table[key[-1]] = value
    source.overrides[key] = position
    return None


_QUOTES = 'strings inside of it need quotes: \'key=["a", "b"]\''


def _key_of(name: str) -> KeyPath:
    """Return the parts of a key, quoted ones among them: data.fields."a b".path; () of no key."""
    if _KEY.fullmatch(name):
        return tuple(name.split("."))
    if "=" in name or "\n" in name:
        return ()
    try:
        return max(_paths(tomllib.loads(f"{name} = 0")), key=len)
    except (ValueError, RecursionError):
        return ()


def parse_value(text: str) -> Any:
    """Return the value of an override.

    Raises:
        ValueError: with the reason, if there is none.
    """
    if not text:
        raise ValueError("no value; an empty string is '\"\"', quotes and all")
    if "\n" in text:
        raise ValueError("more than one line")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
        # Of no use as what they are, and 10:00:00 is the limit of a job.
        return text if isinstance(value, datetime.date | datetime.time) else value
    except RecursionError:
        raise ValueError("nested too deeply to be read") from None
    except tomllib.TOMLDecodeError as error:
        if text[0] not in "[{\"'":
            return text
        reason = re.sub(r"\s*\(at [^()]*\)$", "", str(error))
        hint = f"; {_QUOTES}" if "Invalid value" in reason else ""
        raise ValueError(f"not a TOML value: {printable(reason)}{hint}") from None
    except ValueError:
        raise ValueError("a number of thousands of digits") from None


def split_values(text: str) -> list[Any]:
    """Return the values between the commas of a list without brackets: "1e-3,3e-4", "[1, 2],[3]".

    Each is read as the value of an override is.

    Raises:
        ValueError: with the reason, if one of them is none.
    """
    parts, depth, begin = [], 0, 0
    for token in _ITEM.finditer(text):
        depth += (token["open"] is not None) - (token["close"] is not None)
        if token["comma"] and depth == 0:
            parts.append(text[begin : token.start()])
            begin = token.end()
    return [parse_value(part.strip()) for part in (*parts, text[begin:])]


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
