"""Another user of the machine, who plants things in directories that both can write to."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

STRANGER = 65533


@contextmanager
def directory_of_all(mode: int = 0o1777) -> Iterator[Path]:
    """Give a directory in which anybody can make files, such as /tmp."""
    require_root()
    place = Path(tempfile.mkdtemp(prefix="hpctrain-test-", dir="/tmp"))
    try:
        place.chmod(mode)
        yield place
    finally:
        shutil.rmtree(place)


def require_root() -> None:
    if os.geteuid() != 0:
        pytest.skip("to act as another user needs root")


def stranger_does(command: str, *, where: Path) -> None:
    """Have a shell of another user execute a command."""
    require_root()
    subprocess.run(
        ["/bin/sh", "-ec", f"umask 0; {command}"],
        cwd=where,
        user=STRANGER,
        group=STRANGER,
        extra_groups=[],
        check=True,
        capture_output=True,
    )
