"""A trained model to be used anywhere: built, with its weights, and what is done to its inputs."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from hpctrain.checkpoint.export import (
    RECIPE,
    RECIPE_VERSION,
    Weights,
    choose,
    recipe,
)
from hpctrain.checkpoint.tensors import tensors_from_raw
from hpctrain.config.registry import resolve
from hpctrain.config.schema import ComponentSection, Precision
from hpctrain.data.dataset import Field
from hpctrain.data.loading.batch_transform import Scale
from hpctrain.errors import CheckpointError, ConfigError
from hpctrain.training.checkpointing.initialize import read_weights
from hpctrain.training.inference.program_file import SUFFIX, load_program
from hpctrain.training.model.precision import NumberFormat
from hpctrain.training.model.preparation import cast_model
from hpctrain.training.model.wrappers import load_checked
from hpctrain.training.task.regression import in_unit
from hpctrain.utils.json_files import parse_checked
from hpctrain.utils.text import printable


@dataclass(frozen=True, slots=True, kw_only=True)
class _Numbers:
    mean: list[float]
    std: list[float]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Field:
    shape: list[int]
    dtype: str
    units: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Task:
    use: str
    inputs: list[str]
    target: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Model:
    use: str
    arguments: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Recipe:
    """How a model is made and used, as `hpctrain.checkpoint.export.recipe` writes it."""

    version: int
    model: _Model
    task: _Task
    precision: Precision
    transform: str | None = None
    sample_transform: str | None = None
    normalize: dict[str, _Numbers] = field(default_factory=dict)
    fields: dict[str, _Field] = field(default_factory=dict)
    classes: dict[str, list[str]] = field(default_factory=dict)
    fill: dict[str, float] = field(default_factory=dict)


class LoadedModel:
    """A trained model that takes values as files have them, and gives them so.

        model = hpctrain.load_model("forecast.safetensors")
        temperature = model(temperature_now, pressure_now)  # kelvin in, kelvin out

    Attributes:
        module: the model itself, in evaluation mode; it takes what training gave it.
        inputs: names of the fields that it receives, in their order; none: it was trained by steps
            of its own, and takes what its `forward` does.
        target: name of the field that it was trained to predict, if there is one.
        units: of these fields, as the training data's files say them.
        classes: texts that the classes 0, 1, 2 of the target stand for, where files hold texts.
        notes: what of its preprocessing is not done here, such as the user's own transforms.
    """

    def __init__(self, module: nn.Module, made_by: _Recipe, device: torch.device) -> None:
        self.module = module.eval()
        self.inputs = tuple(made_by.task.inputs)
        self.target = made_by.task.target
        self.units = {name: each.units for name, each in made_by.fields.items() if each.units}
        self.classes = tuple(made_by.classes.get(self.target or "", ()))
        self.notes = tuple(
            f"{key} = {use!r} is not applied: give the model what it returns"
            for key, use in (
                ("data.transform", made_by.transform),
                ("data.sample_transform", made_by.sample_transform),
            )
            if use is not None
        )
        self._device = device
        self._format = NumberFormat.of(made_by.precision, device).for_model(module)
        self._normalize = made_by.normalize
        self._fill = made_by.fill
        target = made_by.task.target if made_by.task.use == "regression" else None
        self._unit = self._normalize.get(target or "")

    def __call__(self, *inputs: Any) -> Any:
        """Return what the model makes of its inputs.

        Args:
            inputs: arrays or tensors of (samples, ...), one for each of `inputs`, with the values
                that files have: normalized here as in training, and missing ones (NaN) filled.

        Returns:
            What the model returns, on its device; of a regression whose target was normalized, in
            the unit of the target.

        Raises:
            TypeError: if there are too few or too many inputs.
        """
        if self.inputs and len(inputs) != len(self.inputs):
            raise TypeError(
                f"this model takes {len(self.inputs)} inputs ({', '.join(self.inputs)}), not "
                f"{len(inputs)}"
            )
        given = [torch.as_tensor(each, device=self._device) for each in inputs]
        with torch.no_grad():
            return self.predicted(*given)

    def predicted(self, *inputs: Tensor) -> Any:
        """Return the same of tensors on the device of the model."""
        if not self.inputs:
            with self._format.arithmetic():
                return self.module(*self._format.cast(list(inputs), ()))
        fields = {
            name: self._prepared(name, each) for name, each in zip(self.inputs, inputs, strict=True)
        }
        fields = dict(self._format.cast(fields, self.inputs))
        with self._format.arithmetic():
            output = self.module(*[fields[name] for name in self.inputs])
        if self._unit is None or not isinstance(output, Tensor):
            return output
        wide = output.float() if output.element_size() < 4 else output
        return in_unit(wide, self._unit.mean, self._unit.std)

    def _prepared(self, name: str, values: Tensor) -> Tensor:
        """Return an input as training gave it to the model."""
        if (numbers := self._normalize.get(name)) is not None:
            values = self._scale(name, values, numbers).apply(values.clone())
        if name in self._fill and values.is_floating_point():
            values = torch.nan_to_num(values, nan=self._fill[name])
        return values

    def _scale(self, name: str, values: Tensor, numbers: _Numbers) -> Scale:
        dtype = np.dtype(np.float64 if values.dtype == torch.float64 else np.float32)
        about = {name: Field(tuple(values.shape[1:]), dtype)}
        wide = torch.float64 if self._format.parameters == torch.float64 else torch.float32
        return Scale.of(about, name, numbers.mean, numbers.std, self._device, wide)


class Program(LoadedModel):
    """A model that was exported as a program, which does to its inputs what has to be done."""

    def __init__(self, program: Any, made_by: _Recipe, device: torch.device) -> None:
        # It has left training behind, and knows no `eval`.
        program.eval = lambda: program
        super().__init__(program.to(device), made_by, device)

    def predicted(self, *inputs: Tensor) -> Any:
        """Return what the program makes of tensors."""
        return self.module(*inputs)


_NO_MODELS = ("torch", "numpy", "None")
"""Packages of which classes are models, and functions are not."""


def load_model(path: str | Path, device: str | torch.device = "cpu") -> LoadedModel:
    """Return a trained model with its weights and its preprocessing.

    The training data need not be there. A model of your own is imported from where its config
    named it, as in training, so load only what you trust to name one; of a file none but tensors
    are read.

    Args:
        path: what `ckpt export` has written; or a checkpoint, or a run, whose best checkpoint is
            taken where it keeps one, else its last. Of these the weights are those of the run's
            evaluations.
        device: where the model is to be.

    Raises:
        CheckpointError: if it cannot be read, or is none of these.
        ConfigError: if the model cannot be imported or made.
    """
    path, where = Path(path), torch.device(device)
    if path.is_dir():
        source, _ = choose(path, best=None)
        weights = Weights.read(source, average=None)
        return load_weights(made_of(source), tensors_from_raw(weights.tensors), path, where)
    if path.suffix == SUFFIX:
        program, said = load_program(path)
        return Program(program, _checked(said.encode(), path), where)
    return load_weights(_checked(_recipe_of_export(path), path), read_weights(path), path, where)


def made_of(source: Path) -> _Recipe:
    """Return how the model of a checkpoint is made.

    Raises:
        CheckpointError: if the checkpoint is not whole, or this version does not understand it.
    """
    if (said := recipe(source)) is None:
        raise CheckpointError(f"{source}: its config is of a newer hpctrain: update hpctrain")
    return _checked(json.dumps(said).encode(), source)


def load_weights(
    made_by: _Recipe, weights: Mapping[str, Tensor], path: Path, where: torch.device
) -> LoadedModel:
    """Return a model with these weights."""
    component = ComponentSection(use=made_by.model.use, arguments=made_by.model.arguments)
    make: Any = resolve("model", component)
    _refuse_strange(make, component.use, path)
    try:
        module: Any = make(**made_by.model.arguments)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{path}: {component.use} refuses its arguments: {error}") from error
    if not isinstance(module, nn.Module):
        raise ConfigError(f"{path}: {component.use} makes no torch.nn.Module")
    cast_model(module, NumberFormat.of(made_by.precision, where), where)
    if any(
        type(each).get_extra_state is not nn.Module.get_extra_state for each in module.modules()
    ):
        raise CheckpointError(
            f"{path}: a module of {component.use} has an extra state, which this file does not "
            "hold: use `python -m hpctrain predict`"
        )
    load_checked(module, weights, str(path))
    return LoadedModel(module, made_by, where)


def _refuse_strange(make: Any, use: str, path: Path) -> None:
    """Refuse a file that names a function which makes no model, such as os.system.

    Raises:
        CheckpointError: if it does.
    """
    while isinstance(make, functools.partial):
        make = make.func
    is_model = isinstance(make, type) and issubclass(make, nn.Module)
    package = str(getattr(make, "__module__", None)).partition(".")[0]
    if not is_model and (package in sys.stdlib_module_names or package in _NO_MODELS):
        raise CheckpointError(
            f"{path}: its model is said to be {use}, which makes none: this is not a file that "
            "`ckpt export` has written, and nothing of it was called"
        )


def _recipe_of_export(path: Path) -> bytes:
    try:
        with safe_open(path, framework="pt") as file:
            text: str | None = (file.metadata() or {}).get(RECIPE)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {printable(str(error))}") from error
    if text is None:
        raise CheckpointError(
            f"{path} does not say how its model is made: write it by `python -m hpctrain ckpt "
            "export RUN FILE`, or load its tensors into a model of your own"
        )
    return text.encode()


def _checked(content: bytes, path: Path) -> _Recipe:
    try:
        found = parse_checked(content, _Recipe)
    except ValueError as error:
        raise CheckpointError(f"{path}: what it says of its model is damaged: {error}") from error
    if found.version > RECIPE_VERSION:
        raise CheckpointError(f"{path} was written by a newer hpctrain: update hpctrain")
    return found
