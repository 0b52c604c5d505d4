"""From a started process to a proven world and a ready `torch.distributed` process group.

The package can be called too: `hpctrain.launch(function, np=4)`.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _Launch(ModuleType):
    """This package, which can be called."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """See `hpctrain.launch.function.launch`."""
        from hpctrain.launch.function import launch

        return launch(*args, **kwargs)


# A package is an attribute of the one that it is in: nothing else can have its name.
sys.modules[__name__].__class__ = _Launch
