"""Several jobs in one process, each as if it had been started by itself."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ENDED = "ended with "
"""How the line begins that rank 0 prints after a job, before its exit code."""


def outputs_of(site: Path, number: int) -> tuple[Path, Path]:
    """Return the files that take what all ranks print in a job, on stdout and on stderr."""
    return site / f"stdout-{number}.txt", site / f"stderr-{number}.txt"


@contextmanager
def as_if_started(site: Path) -> Iterator[None]:
    """Have a folder's modules be found, and forgotten afterwards; restore what else a job sets."""
    folder, path, environment = Path.cwd(), list(sys.path), dict(os.environ)
    os.chdir(site)
    sys.path.insert(0, str(site))  # as `python -m` does
    try:
        yield
    finally:
        os.chdir(folder)
        sys.path[:] = path
        os.environ.clear()
        os.environ.update(environment)
        for name, module in list(sys.modules.items()):
            if str(getattr(module, "__file__", None)).startswith(f"{site}{os.sep}"):
                del sys.modules[name]
