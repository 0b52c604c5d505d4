"""A trained model as a program of torch.export: it runs without its source and without hpctrain.

What is done to its inputs is part of the program: it takes the values that files hold, of any
number of samples, and gives predictions in the unit of the target.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hpctrain.checkpoint.export import RECIPE, Weights, choose
from hpctrain.checkpoint.tensors import tensors_from_raw
from hpctrain.errors import CheckpointError
from hpctrain.training.inference.loaded_model import LoadedModel, load_weights, made_of
from hpctrain.training.inference.program_file import SUFFIX, quiet_torch
from hpctrain.utils.files import replacement

_SAMPLES = 3, 1, 5
"""Of the trace, and of those that have to come out the same as without one."""


class _Whole(nn.Module):
    """A model together with what is done to its inputs and outputs."""

    def __init__(self, loaded: LoadedModel) -> None:
        super().__init__()
        self.module = loaded.module
        self._loaded = loaded

    def forward(self, *inputs: Tensor) -> Any:
        """Return what the model makes of values as files hold them."""
        return self._loaded.predicted(*inputs)


def export_program(path: Path, target: Path, *, average: bool = False, best: bool = False) -> str:
    """Write a trained model as a program, and say what it takes.

    Args:
        path: a checkpoint, or a run, whose newest is meant.
        target: the file.
        average: take the moving averages of the parameters where there are some.
        best: take the best checkpoint of the run, not its newest.

    Raises:
        CheckpointError: if the checkpoint is not whole, the model is none that can be traced, or
            comes out otherwise for another number of samples; or the file cannot be written.
    """
    weights = Weights.read(choose(path, best=best)[0], average=average)
    made_by, where = made_of(weights.source), torch.device("cpu")
    loaded = load_weights(made_by, tensors_from_raw(weights.of_model()), path, where)
    inputs = _examples(loaded, made_by, target)
    program = _traced(_Whole(loaded).eval(), inputs[0], target)
    _check_same(program, loaded, inputs[1:], target)
    facts = {RECIPE: json.dumps(asdict(made_by)), "weights": weights.which}
    try:
        with replacement(target) as temporary, quiet_torch():
            # Its name has to have the ending.
            file = temporary.with_name(f"{temporary.name}{SUFFIX}")
            torch.export.save(program, file, extra_files=facts)
            file.replace(temporary)
    except OSError as error:
        raise CheckpointError(f"cannot write {target}: {error}") from error
    shapes = ", ".join(f"{tuple(each.shape[1:])} {each.dtype}" for each in inputs[0])
    return (
        f"{target}: a program of torch.export for any number of samples of {shapes}, "
        f"{weights.which} weights of step {weights.step:,}"
    )


def _examples(loaded: LoadedModel, made_by: Any, target: Path) -> list[list[Tensor]]:
    """Return inputs of several numbers of samples, drawn at random.

    Raises:
        CheckpointError: if the checkpoint does not say what the inputs are.
    """
    own: Any = getattr(loaded.module, "example_input_array", None)
    if not loaded.inputs and own is not None:
        given = list(own) if isinstance(own, tuple | list) else [own]
        if not all(isinstance(each, Tensor) and each.ndim for each in given):
            raise CheckpointError(f"{target}: example_input_array is not a tensor of samples")
        return [[_repeated(each, count) for each in given] for count in _SAMPLES]
    missing = [name for name in loaded.inputs if name not in made_by.fields]
    if missing or not loaded.inputs:
        what = ", ".join(missing) or "its inputs"
        raise CheckpointError(
            f"{target}: the checkpoint does not say the shape of {what}: of a LightningModule "
            "`example_input_array` says it; a run of files does since this version"
        )
    generator = torch.Generator().manual_seed(0)
    fields = [made_by.fields[name] for name in loaded.inputs]
    return [
        [_drawn((count, *each.shape), each.dtype, generator) for each in fields]
        for count in _SAMPLES
    ]


def _repeated(example: Tensor, count: int) -> Tensor:
    """Return so many samples of those of an example."""
    return example[torch.arange(count) % len(example)]


def _drawn(shape: Sequence[int], dtype: str, generator: torch.Generator) -> Tensor:
    kind = getattr(torch, dtype, torch.float32)
    if kind.is_floating_point or kind.is_complex:
        return torch.rand(shape, generator=generator).to(kind)
    return torch.randint(2, shape, generator=generator).to(kind)


def _traced(whole: nn.Module, inputs: Sequence[Tensor], target: Path) -> Any:
    """Return the program of a model.

    Raises:
        CheckpointError: with torch's reason, if it is none that can be traced.
    """
    samples = torch.export.Dim("samples", min=1)
    try:
        with quiet_torch():
            return torch.export.export(
                whole, tuple(inputs), dynamic_shapes=(tuple({0: samples} for _ in inputs),)
            )
    except Exception as error:
        reason = str(error).strip().partition("\n")[0][:300]
        raise CheckpointError(
            f"{target}: torch.export cannot trace this model for any number of samples "
            f"({type(error).__name__}: {reason}). What it does must not depend on values or on the "
            "size of the batch; FILE.safetensors holds it as it is"
        ) from error


def _check_same(
    program: Any, loaded: LoadedModel, inputs: Sequence[Sequence[Tensor]], target: Path
) -> None:
    """Compare a program with the model for other numbers of samples.

    Raises:
        CheckpointError: if it gives something else.
    """
    run = program.module()
    for given in inputs:
        try:
            torch.testing.assert_close(
                run(*given), loaded.predicted(*given), rtol=1e-3, atol=1e-4, equal_nan=True
            )
        except Exception as error:
            reason = str(error).strip().partition("\n")[0]
            raise CheckpointError(
                f"{target}: the traced program differs from the model for {len(given[0])} samples "
                f"({reason}): FILE.safetensors holds it as it is"
            ) from error
