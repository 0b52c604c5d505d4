"""Data that do not fit: shapes, dtypes, indices out of range, with their field and config key."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hpctrain.config import Config
from hpctrain.data.loading.batch import TrainBatches, named_tensors
from hpctrain.errors import ConfigError, HpctrainError, TrainingError
from hpctrain.training.nonfinite import listed_rows

_CHANNELS = ("chan", "in_dim", "input")
_FEATURES = ("in_features", "input", "features", "dim", "size", "width")
_WHOLE = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool)


def explain_misfit(error: Exception, fields: Any, config: Config) -> HpctrainError | None:
    """Return an error in terms of the config, None where it is another kind of error.

    Args:
        error: that a model or a task raised in its first pass.
        fields: that it had been given, of any structure.
        config: names the model, its arguments and the fields of the task.
    """
    if isinstance(error, HpctrainError):
        return None
    text = str(error)
    for pattern, explain in _KNOWN:
        if match := re.search(pattern, text):
            explained = explain(match, _Given(fields, config))
            first_line = text.splitlines()[0]
            return ConfigError(f"{explained} (torch: {first_line})")
    return None


class _Given:
    """What the task was given, in words."""

    def __init__(self, fields: Any, config: Config) -> None:
        self._fields = dict(named_tensors(fields))
        self._config = config
        named = [name for name in config.task.inputs if name in self._fields]
        self.inputs = named or list(self._fields)
        target = config.task.target
        self.target = target if target in self._fields else None

    def described(self, name: str) -> str:
        """Return a field as `"x" (8, 3) float32`."""
        tensor = self._fields[name]
        dtype = str(tensor.dtype).removeprefix("torch.")
        return f'the field "{name}" is {tuple(tensor.shape)} {dtype}'

    def all_inputs(self) -> str:
        return ", ".join(self.described(name) for name in self.inputs)

    def whole_inputs(self) -> list[str]:
        """Return the inputs of whole numbers."""
        return [name for name in self.inputs if self._fields[name].dtype in _WHOLE]

    def has_float_target(self) -> bool:
        return self.target is not None and self._fields[self.target].is_floating_point()

    def range_of(self, name: str) -> tuple[float, float]:
        tensor = self._fields[name]
        return tensor.min().item(), tensor.max().item()

    def argument(self, value: int, words: tuple[str, ...], instead: int) -> str:
        """Return how to change the model's argument that has a value, preferably one named so."""
        named = [key for key, given in self._config.model.arguments.items() if given == value]
        named.sort(key=lambda key: not any(word in key for word in words))
        if named:
            return f"set model.{named[0]} = {instead}"
        return f"change the arguments of [model] so that it takes {instead}"


def _channels(match: re.Match[str], given: _Given) -> str:
    wanted, got = int(match[1]), int(match[2])
    return (
        f"the model has a layer for {wanted} channels and was given {got}: {given.all_inputs()}, "
        "and channels are the first axis of a sample. "
        f"{_capital(given.argument(wanted, _CHANNELS, got))}, or move the axes by data.transform"
    )


def _batch_statistics(match: re.Match[str], given: _Given) -> str:
    wanted, got = int(match[2]), int(match[1])
    return (
        f"the model has a normalisation of {wanted} channels and was given {got}: "
        f"{given.all_inputs()}. {_capital(given.argument(wanted, _CHANNELS, got))}"
    )


def _features(match: re.Match[str], given: _Given) -> str:
    return _other_features(int(match[1]), int(match[2]), given)


def _wanted_features(match: re.Match[str], given: _Given) -> str:
    return _other_features(int(match[2]), int(match[1]), given)


def _other_features(got: int, wanted: int, given: _Given) -> str:
    return (
        f"the model has a layer for {wanted} features and was given {got}: {given.all_inputs()}. "
        f"{_capital(given.argument(wanted, _FEATURES, got))}"
    )


def _axes(match: re.Match[str], given: _Given) -> str:
    return (
        f"the model wants samples of other axes than it was given ({match[1]}): "
        f"{given.all_inputs()}. Images are (channels, height, width): add the axis by "
        "data.transform, or pack them so"
    )


def _tokens(match: re.Match[str], given: _Given) -> str:
    found = []
    for name in given.whole_inputs():
        low, high = given.range_of(name)
        found.append(f"{given.described(name)}, from {low} to {high}")
    return (
        "an embedding of the model has fewer rows than a token asks for, which are counted from 0: "
        f"{'; '.join(found) or given.all_inputs()}. Make the vocabulary larger (model.vocab_size "
        "or what it is called in [model]), or correct the data"
    )


def _no_floats(match: re.Match[str], given: _Given) -> str:
    whole = given.whole_inputs()
    if not whole:
        return _float_labels(match, given) if given.has_float_target() else _dtypes(match, given)
    names = " and ".join(given.described(name) for name in whole)
    keys = " and ".join(f"data.normalize.{name}" for name in whole)
    return (
        f"the model computes with floating-point numbers, but {names}: say by {keys} how they "
        'become such, as "stats" or { mean = 0.0, std = 255.0 }'
    )


def _dtypes(match: re.Match[str], given: _Given) -> str:
    return (
        f"the model and its inputs are of different number formats: {given.all_inputs()}. "
        "training.precision is that of the model; change what the field is stored as, or cast it "
        "by data.transform"
    )


def _float_tokens(match: re.Match[str], given: _Given) -> str:
    return (
        f"an embedding takes whole numbers, int32 or int64: {given.all_inputs()}. Cast them by "
        "data.transform, or store them so; integers of which files mark some as missing become "
        'floats, unless by data.fields.NAME.decode = "integers"'
    )


def _float_labels(match: re.Match[str], given: _Given) -> str:
    return (
        f"the loss takes classes as whole numbers, int64: {_target(given)}. Take a loss for "
        'numbers (task.use = "regression"), or cast them by data.transform'
    )


def _many_labels(match: re.Match[str], given: _Given) -> str:
    return (
        f"the loss takes one class a sample, (samples,): {_target(given)}. Take away the further "
        "axis by data.transform, or name another field by task.target"
    )


def _label_out_of_range(match: re.Match[str], given: _Given) -> str:
    return (
        f"there is a class {match[1]}, and the model's outputs have fewer, counted from 0: "
        f"{_target(given)}. Raise the number of classes (model.num_classes or what it is called in "
        "[model]), correct the data, or set task.ignore_index"
    )


def _target(given: _Given) -> str:
    if given.target is None:
        return given.all_inputs()
    low, high = given.range_of(given.target)
    return f"{given.described(given.target)}, from {low:g} to {high:g}"


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


_INTEGERS = (
    "(?:unsigned char|signed char|short int|long int|short|int|long|bool"
    "|Byte|Char|Short|Int|Long|Bool)"
)
_KNOWN: tuple[tuple[str, Callable[[re.Match[str], _Given], str]], ...] = (
    (r"expected input\[.*?\] to have (\d+) channels, but got (\d+) channels", _channels),
    (r"running_mean should contain (\d+) elements not (\d+)", _batch_statistics),
    (r"shapes cannot be multiplied \(\d+x(\d+) and (\d+)x\d+\)", _features),
    (r"(Expected \dD.* input to conv\dd), but got", _axes),
    (r"index out of range in self", _tokens),
    (r"expected (\dD input \(got \dD input\))", _axes),
    (r"normalized_shape=\[(\d+)\], .* got input of size ?\[.*?(\d+)\]", _wanted_features),
    (r"input_size\. Expected (\d+), got (\d+)", _wanted_features),
    (r"expecting embedding dimension of (\d+), but got (\d+)", _wanted_features),
    (rf"Input type \((?:torch\.)?(?:cuda\.)?{_INTEGERS}(?:Tensor)?\)", _no_floats),
    (rf"same dtype, but got: {_INTEGERS} !=", _no_floats),
    (rf"not implemented for '{_INTEGERS}'", _no_floats),
    (r"mixed dtype \(CPU\)", _no_floats),
    (r"RNN input dtype \(torch\.(?:u?int\d+|bool)\)", _no_floats),
    (rf"could not infer output dtype\. .* Got: {_INTEGERS}", _no_floats),
    (rf"expected scalar type {_INTEGERS} but found (?:Float|Double|BFloat16|Half)", _no_floats),
    (rf"must have the same dtype, but got {_INTEGERS} and", _no_floats),
    (r"argument #1 'indices' to have one of the following scalar types", _float_tokens),
    (r"multi-target not supported", _many_labels),
    (
        r"expected target dtype to be Long|expected scalar type Long but found",
        _float_labels,
    ),
    (r"Target (-?\d+) is out of bounds", _label_out_of_range),
    (r"(?:must have the same dtype|expected scalar type \w+ but found)", _dtypes),
)
"""Patterns of torch's messages, the particular before the general."""


_WORDS = ("device-side assert", "out of range", "out of bounds")

Batch = tuple[int, int, int]
"""Epoch, position of the first sample in it, and samples of all ranks."""


def check_range(field: str, values: Tensor, count: int, ignored: int | None = None) -> None:
    """Look for indices that are none of `count`, counted from 0. Waits for the device.

    Args:
        field: that they are of.
        values: whole numbers.
        count: of what they index.
        ignored: one that is allowed besides.

    Raises:
        TrainingError: naming the field, and what it holds.
    """
    bad = (values < 0) | (values >= count)
    if ignored is not None:
        bad &= values != ignored
    if bad.any():
        wrong = values[bad]
        raise TrainingError(out_of_range(field, wrong.min().item(), wrong.max().item(), count))


def out_of_range(field: str, least: float, most: float, count: int) -> str:
    """Return what to say of a field with numbers that index nothing."""
    held = f"{least}" if least == most else f"{least} to {most}"
    return (
        f'the field "{field}" holds {held}, and the model has {count} classes or tokens, 0 to '
        f"{count - 1}. Correct the data, the number of classes or tokens (model.num_classes, "
        "model.vocabulary, or what it is called in [model]), or task.ignore_index"
    )


@contextmanager
def ranges_checked(task: Any) -> Iterator[None]:
    """Have a task that can do so look at ranges in the body."""
    look_at_ranges(task, looks=True)
    try:
        yield
    finally:
        look_at_ranges(task, looks=False)


def look_at_ranges(task: Any, *, looks: bool) -> None:
    """Say whether a task that can do so looks at ranges from now on, which waits for the device."""
    if hasattr(task, "checks_ranges"):
        task.checks_ranges = looks


@contextmanager
def explained_indices(
    task: Any, loader: TrainBatches, batches: Callable[[], Sequence[Batch]]
) -> Iterator[None]:
    """Raise what the body raises about an index, with the samples it came from.

    Args:
        task: its `index_ranges`, if it has them, are by field how many things the numbers index,
            and a number that is allowed besides, or None.
        loader: of the batches.
        batches: returns those that may be under way, oldest first.
    """
    try:
        yield
    except (RuntimeError, IndexError) as error:
        text = str(error)
        if isinstance(error, HpctrainError) or not any(word in text.lower() for word in _WORDS):
            raise
        ranges = getattr(task, "index_ranges", {})
        found = _find(ranges, loader, batches())
        if found is not None:
            raise TrainingError(found) from error
        if _WORDS[0] not in text:
            raise  # the traceback says where
        raise TrainingError(
            "the device ended with a device-side assertion: most often a class or a token that the "
            f"model has no place for{_looked_at(ranges)}. CUDA_LAUNCH_BLOCKING=1 has the traceback "
            'point at the call, and launch.device = "cpu" says what it is'
        ) from error


def _looked_at(ranges: Mapping[str, Any]) -> str:
    names = " and ".join(f'"{name}"' for name in ranges)
    return f"; {names} as stored is not it" if names else ""


def _find(
    ranges: Mapping[str, tuple[int, int | None]], loader: TrainBatches, batches: Sequence[Batch]
) -> str | None:
    """Return what the first batch holds that is out of range, read again on the host."""
    if not ranges:
        return None
    for epoch, start, size in batches:
        try:
            rows = loader.rows(epoch, start, start + size)
            values = loader.read(rows) if len(rows) else {}
        except HpctrainError:
            continue
        for field, (count, ignored) in ranges.items():
            if field not in values:
                continue
            numbers = np.asarray(values[field]).reshape(len(rows), -1)
            bad = (numbers < 0) | (numbers >= count)
            if ignored is not None:
                bad &= numbers != ignored
            if bad.any():
                wrong = numbers[bad]
                text = out_of_range(field, wrong.min().item(), wrong.max().item(), count)
                return f"{listed_rows(loader, rows[bad.any(axis=1)])}: {text}"
    return None
