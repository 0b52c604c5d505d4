"""Fixtures that the tests of this folder share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from slurm import Lab, why_not


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
