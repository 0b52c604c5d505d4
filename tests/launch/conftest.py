"""Fixtures that the tests of this folder share."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers.jobs import Job, interruptible
from helpers.launching import ROOT
from helpers.slurm import Lab, why_not

from hpctrain.convert.digits import pack_digits


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packed digits; whoever changes them makes a copy."""
    folder = tmp_path_factory.mktemp("packed") / "digits"
    pack_digits(folder)
    return folder


@pytest.fixture
def site(tmp_path: Path, digits: Path) -> Path:
    """A directory to start jobs in: the documented example and its data."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "digits").symlink_to(digits)
    shutil.copy(ROOT / "configs" / "run.toml", tmp_path / "run.toml")
    return tmp_path


@pytest.fixture
def start(site: Path) -> Iterator[Callable[..., Job]]:
    """What starts jobs of the site that are to be interrupted."""
    with interruptible(site) as start:
        yield start


@pytest.fixture(scope="session")
def slurm_lab() -> Iterator[Lab]:
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    with Lab() as lab:
        yield lab


@pytest.fixture
def slurm(slurm_lab: Lab) -> Iterator[Lab]:
    """A Slurm of two nodes, n1 and n2, with nothing on them."""
    yield slurm_lab
    slurm_lab.cancel_all()
