"""The user's own code in this process: what was imported, and what is in its files."""

from __future__ import annotations

import os
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from pathlib import Path

from hpctrain.utils.files import file_checksum
from hpctrain.utils.text import listed

_INSTALLED = {"site-packages", "dist-packages"}
_MOST_MODULES = 2000
_OURS = Path(__file__).resolve().parents[1]
_SHOWN = 4

Modules = Mapping[str, Mapping[str, str]]
"""By name: "file", as seen from the current directory, and "xxh3", hexadecimal."""


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
        # Thousands are told by their names; links are followed, name by name, for the rest.
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

    A module that only one of the two has imported is told too: it may do what another did before.
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
