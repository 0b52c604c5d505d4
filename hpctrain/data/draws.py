"""The old name of `hpctrain.data.random`, which transforms may use until the next minor version."""

from __future__ import annotations

import warnings

from hpctrain.data.random import hashes, integers, normal, uniform

__all__ = ["hashes", "integers", "normal", "uniform"]

warnings.warn(
    "hpctrain.data.draws is called hpctrain.data.random: write `from hpctrain.data import random`",
    DeprecationWarning,
    stacklevel=2,
)
