"""The line of every key of a TOML text, which the standard library's parser does not tell.

TOML is a sequence of statements, `[header]` or `key = value`, each on a line of its own; only lists
and long strings go on over further lines. So the text is cut into statements at the ends of lines
outside brackets and strings, and every statement is parsed alone. Linear in the text.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from typing import Any

from hpctrain.config.messages import KeyPath

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

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
