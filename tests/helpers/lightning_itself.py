"""Lightning's own Trainer, to compare with: in a process of the tests, which MPI is kept out of."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def trainer(**arguments: Any) -> Any:
    """Return a quiet one on the CPU that does not ask mpi4py where it is.

    It would start MPI in this process, and whatever a later test starts from here would be the
    child of a rank.
    """
    import lightning
    from lightning.pytorch.plugins.environments import LightningEnvironment

    quiet = {
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return lightning.Trainer(plugins=[LightningEnvironment()], **(quiet | arguments))


@contextmanager
def quietly() -> Iterator[None]:
    """Keep what Lightning says of its own from the tests' output and warnings."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
