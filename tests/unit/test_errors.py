"""What hpctrain explains of failures that came of something else."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hpctrain.batch.sweep import Sweep, write_sweep
from hpctrain.config.toml import read
from hpctrain.convert.digits import pack_digits
from hpctrain.data import open_dataset
from hpctrain.errors import CheckpointError, ConfigError, DatasetError, HpctrainError


@contextmanager
def no_more_files() -> Iterator[str]:
    """Let this process open no further file, and tell the hard limit."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.dup(0)  # the lowest number that is
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, limits[1]))
    try:
        yield f"; open files: soft limit {free}, hard limit {limits[1]}: ulimit -n {limits[1]} in"
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_too_many_open_files_tell_the_limits(tmp_path: Path) -> None:
    """Wherever files are opened: of a config, of data, of what is written."""
    pack_digits(tmp_path / "digits")
    (tmp_path / "run.toml").touch()
    open_dataset(tmp_path / "digits" / "train")  # what it imports is loaded
    sweep = Sweep(folder=tmp_path, command=("run.toml",), points=())
    for error, act in (
        (ConfigError, lambda: read(str(tmp_path / "run.toml"))),
        (ConfigError, lambda: write_sweep(sweep)),
        (DatasetError, lambda: open_dataset(tmp_path / "digits" / "train")),
    ):
        with no_more_files() as limits:
            with pytest.raises(error) as caught:
                act()
            told = str(caught.value)
        assert "Too many open files" in told
        assert told.count(limits) == 1


def test_other_failures_do_not() -> None:
    try:
        raise OSError(28, "No space left on device")
    except OSError as error:
        told = CheckpointError(f"x: {error.strerror}")
        told.__cause__ = error
    assert str(told) == "x: No space left on device"
    assert str(HpctrainError("a")) == "a"
