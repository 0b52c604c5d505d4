"""Lightning's Trainer over hpctrain: `from hpctrain.lightning import Trainer` is the one change.

Lightning itself is imported nowhere: modules, data modules, callbacks and loggers are known by the
methods that they have.
"""

from __future__ import annotations

from hpctrain.lightning.trainer import Trainer

__all__ = ["Trainer"]
