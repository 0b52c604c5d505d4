"""A TOML file to frozen dataclasses, with every mistake explained. Needs neither torch nor MPI."""

from __future__ import annotations

from hpctrain.config.loading import load
from hpctrain.config.rendering import to_toml
from hpctrain.config.schema import Config

__all__ = ["Config", "load", "to_toml"]
