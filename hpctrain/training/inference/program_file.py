"""Files of torch.export: read as tensors and programs alone, nothing that could run code."""

from __future__ import annotations

import logging
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from hpctrain.checkpoint.export import RECIPE
from hpctrain.errors import CheckpointError
from hpctrain.utils.text import listed

SUFFIX = ".pt2"
"""Ends the names of their files."""

_KNOWN = re.compile(
    r"(data/(weights|sample_inputs)/.*|data/constants/(tensor_\d+|\w+_config\.json)|models/.*\.json"
    r"|extra/.*|\.data/.*|archive_format|archive_version|byteorder|version)"
)
"""Records of a program and its tensors."""


def load_program(path: Path) -> tuple[Any, str]:
    """Return a program that `export_program` has written, and what it says of its making.

    Tensors alone are read of it: torch would take other objects from a file by pickle, and
    libraries that were compiled, both of which run whatever their maker liked.

    Raises:
        CheckpointError: if it is none, or holds such objects.
    """
    facts = {RECIPE: ""}
    _refuse_objects(path)
    try:
        with quiet_torch(), _tensors_only():
            program = torch.export.load(path, extra_files=facts)
    except Exception as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not facts[RECIPE]:
        raise CheckpointError(
            f"{path} does not say what it takes: write it by `python -m hpctrain ckpt export RUN "
            f"FILE{SUFFIX}`, or load it by torch.export.load"
        )
    return program.module(), facts[RECIPE]


def _refuse_objects(path: Path) -> None:
    """Refuse a file with more in it than a program and tensors.

    Raises:
        CheckpointError: naming what it holds, or if it cannot be read.
    """
    try:
        records = torch._C.PyTorchFileReader(str(path)).get_all_records()
    except Exception as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if strange := [name for name in records if not _KNOWN.fullmatch(name)]:
        raise CheckpointError(
            f"{path} holds {listed(strange, 3)}, which could run any code when it is read: only "
            "programs and tensors are read here. Where you trust its maker, torch.export.load does"
        )


@contextmanager
def _tensors_only() -> Iterator[None]:
    """Have torch refuse in the body what pickle alone could read; it falls back to that."""
    names = ("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD")
    before = {name: os.environ.pop(name) for name in names if name in os.environ}
    os.environ[names[0]] = "1"
    try:
        yield
    finally:
        del os.environ[names[0]]
        os.environ.update(before)


@contextmanager
def quiet_torch() -> Iterator[None]:
    """Keep torch from warning of its own insides in the body."""
    level = logging.getLogger("torch").level
    logging.getLogger("torch").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.getLogger("torch").setLevel(level)
