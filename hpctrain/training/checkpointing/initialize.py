"""Initial weights of a new run from elsewhere: which file they are in, and which name is which."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from hpctrain.checkpoint.export import TASK
from hpctrain.checkpoint.format import EVALUATION
from hpctrain.checkpoint.load import Loaded, fitting_names, load
from hpctrain.checkpoint.tensors import joined_pairs
from hpctrain.config.schema import CheckpointSection
from hpctrain.errors import CheckpointError, ConfigError
from hpctrain.launch.process_group import World
from hpctrain.topology import raise_together
from hpctrain.training.checkpointing.snapshot import is_extra, model_tensors, put_weights
from hpctrain.training.parallel.ddp import broadcast_tensors
from hpctrain.training.step import TrainStep
from hpctrain.utils.files import require_regular
from hpctrain.utils.text import listed, printable

_SHOWN = 4
# Under which a file may keep the weights: Lightning's word first.
_WRAPPERS = ("state_dict", "model_state_dict", "model")


_OF_BROKEN_FILES = (
    *(OSError, EOFError, RuntimeError, SafetensorError, MemoryError, ImportError),
    *(LookupError, ValueError, TypeError, AttributeError, AssertionError, ArithmeticError),
)
"""What torch and safetensors raise on files that are damaged, or that say what cannot be."""


def start_warm(section: CheckpointSection, world: World, step: TrainStep) -> str:
    """Put the weights that the config names into the model, and say so. Collective: all ranks.

    Raises:
        HpctrainError: on every rank, if they cannot be read or do not fit.
    """
    assert section.initialize_from is not None
    read = None
    with raise_together(world.communicator):
        if world.topology.is_rank_zero:
            read = read_weights(Path(section.initialize_from))
    weights = broadcast_tensors(world, read)
    with raise_together(world.communicator):
        fitting, differing = choose(
            step.model, weights, section.initialize_names, strict=section.initialize_strict
        )
        put_weights(step, fitting)
    if step.average is not None:
        step.average.load({})
    return f"initialized from {section.initialize_from}: {differing}"


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return the weights of a file by name, on the host.

    Args:
        path: safetensors; what torch.save has written of a state_dict, or Lightning of a whole
            checkpoint; or a run or checkpoint folder of hpctrain. Nothing in it is executed.

    Raises:
        CheckpointError: if it cannot be read, or holds no tensors by name.
    """
    if path.is_dir():
        return _weights_to_use(load(path))
    try:
        require_regular(path)
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                return joined_pairs(load_file(path), file.metadata())
        found: Any = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} holds more than tensors, and is not executed to find out what. Where it comes "
            "from a source you trust, convert it once: safetensors.torch.save_file("
            f'torch.load("{path.name}", weights_only=False)["state_dict"], "weights.safetensors")'
        ) from error
    except _OF_BROKEN_FILES as error:
        raise CheckpointError(f"{path} cannot be read: {error or type(error).__name__}") from error
    for wrapper in _WRAPPERS:
        if isinstance(found, Mapping) and isinstance(found.get(wrapper), Mapping):
            found = found[wrapper]
            break
    if not isinstance(found, Mapping) or not all(
        isinstance(name, str) and isinstance(item, Tensor) for name, item in found.items()
    ):
        raise CheckpointError(f"{path} holds no tensors by name: expected a state_dict")
    return dict(found)


def _weights_to_use(loaded: Loaded) -> dict[str, Tensor]:
    """Return the weights of a checkpoint to evaluate with, where it has a second set of them."""
    second = {
        loaded.model[name.removeprefix(EVALUATION)].data_ptr(): item
        for name, item in loaded.training.items()
        if name.startswith(EVALUATION)
    }
    # Tied parameters have one memory and several names.
    return {name: second.get(item.data_ptr(), item) for name, item in loaded.model.items()}


def choose(
    model: nn.Module, weights: Mapping[str, Tensor], names: Mapping[str, str], *, strict: bool
) -> tuple[dict[str, Tensor], str]:
    """Find what a model takes of weights.

    Args:
        model: whose parameters and buffers.
        weights: by their names in the file.
        names: beginnings of names in the file, and what stands for them in the model; of several
            that fit the longest counts.
        strict: refuse anything without a counterpart of the same shape; else report it.

    Returns:
        Those that fit, by their plain names in the model, and what to say. What wrappers such as
        torch.compile have put into names, in the file or here, makes no difference.

    Raises:
        ConfigError: if `strict` and something has no counterpart, or nothing at all has one.
    """
    renamed = {_renamed(name, names): item for name, item in weights.items()}
    here = {name: item for name, item in model_tensors(model).items() if not is_extra(name)}
    if not all(any(name.startswith(TASK) for name in names) for names in (here, renamed)):
        # An export has nothing of the task, which then begins as it was made.
        here, renamed = _without_task(here), _without_task(renamed)
    if len(renamed) < len(weights):
        raise ConfigError("checkpoint.initialize_names: two tensors get the same name by it")
    called = fitting_names(here, renamed)
    renamed = {called.get(name, name): item for name, item in renamed.items()}
    fitting = {
        name: item
        for name, item in renamed.items()
        if name in here and here[name].shape == item.shape
    }
    leftover = {
        "only in the file": [name for name in renamed if name not in here],
        "only in the model": [name for name in here if name not in renamed],
        "of another shape": [name for name in renamed if name in here and name not in fitting],
    }
    text = "; ".join(
        f"{what}: {listed([printable(name) for name in which], _SHOWN)}"
        for what, which in leftover.items()
        if which
    )
    if text and (strict or not fitting):
        hint = _hint(list(renamed), here)
        relax = ", or set initialize_strict = false" if strict and fitting else ""
        raise ConfigError(
            f"checkpoint.initialize_from: {len(fitting)} of {len(here)} tensors of the model fit "
            f"({text}). Set checkpoint.initialize_names{hint}{relax}"
        )
    return fitting, f"{len(fitting)} of {len(here)} tensors" + (f" ({text})" if text else "")


def _without_task(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: item for name, item in tensors.items() if not name.startswith(TASK)}


def _renamed(name: str, names: Mapping[str, str]) -> str:
    fitting = [prefix for prefix in names if name.startswith(prefix)]
    if not fitting:
        return name
    prefix = max(fitting, key=len)
    return names[prefix] + name.removeprefix(prefix)


def _hint(names: list[str], here: Mapping[str, Tensor]) -> str:
    """Return the table that would help, where one beginning of all names is all that differs."""
    for prefix in {name[: name.find(".") + 1] for name in names if "." in name}:
        if all(name.startswith(prefix) and name.removeprefix(prefix) in here for name in names):
            return f' = {{ "{prefix}" = "" }}'
    for prefix in {name[: name.find(".") + 1] for name in here if "." in name}:
        if all(prefix + name in here for name in names):
            return f' = {{ "" = "{prefix}" }}'
    return ""
