"""Cache of compiled kernels: on the node, for the ranks there, and between jobs if wanted.

Compilers keep them in the home directory, or under a name in /tmp that others could make first, and
what lies there is run. Home is often a file system without locks, and slow for many small files.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from pathlib import Path

import torch

from hpctrain.config import Config
from hpctrain.launch.process_group import World
from hpctrain.topology import raise_together
from hpctrain.utils.files import open_regular, replace_file
from hpctrain.utils.permissions import open_directory, open_private, require_stable

logger = logging.getLogger("hpctrain")

ARCHIVE = "compiled.bin"
"""In the run folder."""
_FOLDERS = {
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "TRITON_CACHE_DIR": "triton",
    "MIOPEN_USER_DB_PATH": "miopen",
    "MIOPEN_CUSTOM_CACHE_DIR": "miopen",
}


def keep_on_node(
    environ: MutableMapping[str, str] = os.environ, directory: str | None = None
) -> Path | None:
    """Have Inductor, Triton and MIOpen keep kernels in a folder of this user's on this node.

    Args:
        environ: what the user has set there stays.
        directory: of the node's disk; None: $TMPDIR, or /tmp.

    Returns:
        The folder; None if there can be no safe one, and all stays as it is.
    """
    name = f"hpctrain-compiled-{os.geteuid()}"
    try:
        real = require_stable(directory or tempfile.gettempdir())
        disk = open_directory(real)
        try:
            os.close(open_private(name, disk, real / name, make=True))
        finally:
            os.close(disk)
    except OSError as error:
        logger.warning("compiled kernels are kept where the compilers keep them: %s", error)
        return None
    for variable, folder in _FOLDERS.items():
        environ.setdefault(variable, str(real / name / folder))
    return real / name


@contextmanager
def kept_compiled(config: Config, world: World) -> Iterator[None]:
    """Begin with what an earlier job of the run has compiled, and keep what the body compiles.

    Where that is wanted. Collective: all ranks.
    """
    folder = Path(config.run.directory, config.run.name)
    keeps = config.training.compile and config.training.keep_compiled
    if keeps:
        bring_back(world, folder)
    yield
    if keeps and world.topology.is_rank_zero:
        put_by(folder)


def bring_back(world: World, run_folder: Path) -> None:
    """Give every node what an earlier job of the run has compiled. Collective: all ranks.

    An archive that is not ours alone, or of another torch, is passed over with a warning.
    """
    with raise_together(world.communicator):
        if world.topology.local_rank == 0:
            content = _read(run_folder / ARCHIVE)
            if content is not None:
                try:
                    torch.compiler.load_cache_artifacts(content)
                except Exception as error:  # noqa: BLE001 - it only costs the time to compile
                    logger.warning("%s is of no use: %s", run_folder / ARCHIVE, error)


def put_by(run_folder: Path) -> None:
    """Keep what this process has compiled for later jobs of the run, in one archive."""
    if not hasattr(torch.compiler, "save_cache_artifacts"):
        logger.warning("training.keep_compiled needs torch 2.7 or newer: nothing is kept")
        return
    saved = torch.compiler.save_cache_artifacts()
    if saved is None:
        return
    path = run_folder / ARCHIVE
    try:
        replace_file(path, saved[0])
        path.chmod(0o600)
    except OSError as error:
        logger.warning("cannot keep compiled kernels in %s: %s", path, error)


def _read(path: Path) -> bytes | None:
    """Return an archive that nobody else can have written: what is in it is run."""
    if not hasattr(torch.compiler, "load_cache_artifacts"):
        return None
    try:
        with os.fdopen(open_regular(path, follow_links=False), "rb") as file:
            facts = os.fstat(file.fileno())
            if facts.st_uid != os.geteuid() or facts.st_mode & 0o022:
                raise PermissionError("others own it or may write to it, and what is in it is run")
            return file.read()
    except FileNotFoundError:
        return None
    except OSError as error:
        logger.warning("%s is passed over: %s", path, error)
        return None
