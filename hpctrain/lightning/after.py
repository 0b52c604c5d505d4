"""Module of a script after `fit`: trained, whole (unsharded after fsdp), on the host."""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hpctrain.checkpoint.export import Weights
from hpctrain.checkpoint.format import resolved
from hpctrain.checkpoint.tensors import tensors_from_raw
from hpctrain.config import Config
from hpctrain.lightning.facts import run_folder
from hpctrain.training.model.wrappers import load_checked

_RANK_ZERO = (
    *("lightning_utilities.core.rank_zero", "lightning.fabric.utilities.rank_zero"),
    *("lightning.pytorch.utilities.rank_zero", "pytorch_lightning.utilities.rank_zero"),
    "lightning_fabric.utilities.rank_zero",
)


class AfterFit:
    """A callback, the last one: takes what the ranks hold together while they are together."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._before = Unsharded(model)
        self._weights: dict[str, Tensor] = {}
        self._trained = False

    def on_fit_end(self, trainer: Any, module: nn.Module) -> None:
        """Take the whole parameters of a module whose rows are spread. Collective: all ranks."""
        del trainer
        self._trained = True
        self._weights = Unsharded.gathered(module)

    def settle(self, config: Config, *, is_complete: bool) -> None:
        """Leave the module as a script expects it.

        Args:
            config: of the run.
            is_complete: whether it has come to its end, in this job or before.
        """
        if self._weights:
            self._before.restore(self._weights)
            self._weights = {}
        if is_complete and not self._trained:
            # The job before had come to the end: nothing was trained here.
            weights = Weights.read(resolved(run_folder(config)))
            load_checked(self._model, tensors_from_raw(weights.tensors), str(weights.source))
        self._model.cpu()


def note_rank(rank: int) -> None:
    """Let Lightning's `rank_zero_only` know the rank, where a script has imported it.

    Functions that a script or a logger decorates with it run on rank 0 then: under mpirun there is
    no variable by which it would know.
    """
    for name in _RANK_ZERO:
        decorator = getattr(sys.modules.get(name), "rank_zero_only", None)
        if decorator is not None:
            decorator.rank = rank


_HOOKS = (
    *("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs"),
    *("_forward_pre_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_state_dict_hooks", "_state_dict_pre_hooks"),
    *("_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"),
)


class Unsharded:
    """Takes down what a module is like, and makes it so again; holds none of its numbers.

    What FSDP2 changes in modules it never takes back: their classes, hooks, the parameters
    themselves, and an entry in a table of torch's. A script goes on with its module, and may fit it
    once more.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._modules = [
            (
                module,
                type(module),
                frozenset(vars(module)),
                {name: OrderedDict(vars(module)[name]) for name in _HOOKS if name in vars(module)},
            )
            for module in model.modules()
        ]
        first: dict[int, str] = {}
        self._names: dict[str, str] = {}
        """Of each parameter, and the first one of those that are the same."""
        for name, item in model.named_parameters(remove_duplicate=False):
            self._names[name] = first.setdefault(id(item), name)

    @staticmethod
    def gathered(model: nn.Module) -> dict[str, Tensor]:
        """Return whole parameters of those that are spread, on the host. Collective: all ranks."""
        whole = {}
        for name, item in model.named_parameters():
            spread: Any = item.detach()
            if isinstance(item, DTensor):
                whole[name] = spread.full_tensor().cpu()
        return whole

    def restore(self, weights: Mapping[str, Tensor]) -> None:
        """Make the module whole.

        Args:
            weights: whole parameters, by name, of those that are spread.
        """
        from torch.distributed import _composable_state

        for module, kind, names, hooks in self._modules:
            module.__class__ = kind
            for name in [each for each in vars(module) if each not in names]:
                if name.startswith("__composable"):
                    del module.__dict__[name]
            for name, there in hooks.items():
                found: OrderedDict[Any, Any] = vars(module)[name]
                found.clear()
                found.update(there)
            _composable_state._module_state_mapping.pop(module, None)
        made: dict[str, nn.Parameter] = {}
        for name, first in self._names.items():
            where, _, local = name.rpartition(".")
            holder = self._model.get_submodule(where)
            item: Any = holder._parameters[local]
            if not isinstance(item, DTensor):
                continue
            if first not in made:
                made[first] = nn.Parameter(weights[first], requires_grad=item.requires_grad)
            holder._parameters[local] = made[first]
