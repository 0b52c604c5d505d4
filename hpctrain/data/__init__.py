"""Sharded HDF5 data in one order, whatever the world size.

Nothing here imports torch but `hpctrain.data.loading` and `draws`: tools and checks start fast.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hpctrain.data.dataset import Dataset, Field
    from hpctrain.data.discovery import open_dataset
    from hpctrain.data.order.partition import Order, default_lanes
    from hpctrain.data.storage import Storage
    from hpctrain.data.writing import Writer

__all__ = ["Dataset", "Field", "Order", "Storage", "Writer", "default_lanes", "open_dataset"]

_HOMES = {
    "Dataset": "dataset",
    "Field": "dataset",
    "Order": "order.partition",
    "Storage": "storage",
    "Writer": "writing",
    "default_lanes": "order.partition",
    "open_dataset": "discovery",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for: h5py and numpy take their time."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
