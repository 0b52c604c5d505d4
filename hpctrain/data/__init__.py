"""Sharded HDF5 data in one order, whatever the world size.

Public is what `__all__` names; all else may change in any version. Nothing here imports torch but
`loading` and `random`: tools and checks start fast.
"""

from __future__ import annotations

import warnings
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hpctrain.data import random
    from hpctrain.data.files.discovery import open_dataset
    from hpctrain.data.files.storage import Storage
    from hpctrain.data.ragged import Ragged
    from hpctrain.data.writer import Writer

__all__ = ["Ragged", "Storage", "Writer", "open_dataset", "random"]

_HOMES = {
    "Ragged": "ragged",
    "Storage": "files.storage",
    "Writer": "writer",
    "open_dataset": "files.discovery",
}
_PUBLIC_BEFORE = {
    "Dataset": "dataset",
    "Field": "dataset",
    "Order": "order.order",
    "default_lanes": "order.order",
}
"""Names that were public once, and are taken until the next minor version."""


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for: h5py, numpy and torch take their time."""
    if name == "random":
        return import_module(f"{__name__}.random")
    if name in _PUBLIC_BEFORE:
        home = f"{__name__}.{_PUBLIC_BEFORE[name]}"
        warnings.warn(
            f"{__name__}.{name} will not be public any more: it is {home}.{name}, which may change "
            "in any version",
            DeprecationWarning,
            stacklevel=2,
        )
        return getattr(import_module(home), name)
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
