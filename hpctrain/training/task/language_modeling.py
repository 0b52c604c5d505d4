"""Language modelling: at every place of a text, the token that comes next."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from hpctrain.errors import ConfigError, TrainingError
from hpctrain.training.task.misfits import check_range
from hpctrain.training.task.task import Direction, Fields


class LanguageModeling:
    """Cross entropy of the next token: the mean over all tokens that count.

    A sample is a run of tokens, of which all but the last go in and all but the first are to be
    predicted.
    """

    metrics: ClassVar[Mapping[str, Direction]] = {
        "loss": "min",
        "bits_per_token": "min",
        "accuracy": "max",
    }

    def __init__(
        self, inputs: Sequence[str], target: str | None, *, ignore_index: int | None = None
    ) -> None:
        """Check the arguments.

        Args:
            inputs: one field of tokens, (samples, length + 1) of any integer type. The model gives
                (samples, length, vocabulary).
            target: none: it is in the tokens.
            ignore_index: a token that is not to be predicted, such as padding.

        Raises:
            ConfigError: if there is not just one field.
        """
        if len(inputs) != 1:
            raise ConfigError(f"task.inputs = {list(inputs)}: language_modeling has one: tokens")
        if target is not None:
            raise ConfigError("task.target: leave it out; the next token is in the tokens")
        self.inputs = tuple(inputs)
        self.counts_samples = ignore_index is None
        self._ignore_index = ignore_index
        self.checks_ranges = False
        self._vocabulary = 0

    @property
    def index_ranges(self) -> dict[str, tuple[int, int | None]]:
        """How many tokens there are, once that is known, and the one that is not predicted."""
        return {self.inputs[0]: (self._vocabulary, self._ignored)} if self._vocabulary else {}

    def loss(self, model: nn.Module, fields: Fields) -> tuple[Tensor, Tensor | int]:
        """Return the summed cross entropy; without ignored tokens, of means over each sample."""
        logits, labels = self._predict(model, fields)
        losses = F.cross_entropy(logits, labels, ignore_index=self._ignored, reduction="sum")
        samples = len(fields[self.inputs[0]])
        if self.counts_samples:
            return losses * (samples / labels.numel()), samples
        return losses, (labels != self._ignored).sum()

    def evaluate(self, model: nn.Module, fields: Fields) -> dict[str, tuple[Tensor, Tensor | int]]:
        """Return sums over tokens: of the cross entropy, in nats and bits, and of right guesses."""
        logits, labels = self._predict(model, fields)
        losses = F.cross_entropy(logits, labels, ignore_index=self._ignored, reduction="none")
        total = losses.double().sum()
        counts = labels != self._ignored
        right = ((logits.argmax(1) == labels) & counts).sum()
        tokens = counts.sum()
        return {
            "loss": (total, tokens),
            "bits_per_token": (total / math.log(2), tokens),
            "accuracy": (right, tokens),
        }

    @property
    def _ignored(self) -> int:
        return -1 if self._ignore_index is None else self._ignore_index  # tokens are from 0

    def _predict(self, model: nn.Module, fields: Fields) -> tuple[Tensor, Tensor]:
        """Return logits, (tokens, vocabulary) of at least float32, and labels, (tokens,) int64."""
        name = self.inputs[0]
        tokens = fields[name]
        if tokens.ndim != 2 or tokens.shape[1] < 2 or tokens.is_floating_point():
            raise TrainingError(
                f'language_modeling needs tokens (samples, length) as integers; "{name}" is '
                f"{tuple(tokens.shape)} {str(tokens.dtype).removeprefix('torch.')}"
            )
        tokens = tokens.long()
        labels = tokens[:, 1:].flatten()
        if self.checks_ranges:
            _check_embedded(name, tokens, model)
        logits = model(tokens[:, :-1])
        if logits.ndim != 3 or logits.shape[:2].numel() != labels.numel():
            raise TrainingError(
                f"language_modeling needs logits (samples, length, vocabulary); the model gave "
                f"{tuple(logits.shape)} for {tuple(tokens[:, :-1].shape)} tokens"
            )
        logits = logits.flatten(0, 1)
        self._vocabulary = logits.shape[1]
        if self.checks_ranges:
            check_range(name, labels, self._vocabulary, self._ignored)
        return (logits.float() if logits.element_size() < 4 else logits), labels


def _check_embedded(name: str, tokens: Tensor, model: nn.Module) -> None:
    """Look for tokens that no embedding of the model has a place for, before it looks them up."""
    sizes = [item.num_embeddings for item in model.modules() if isinstance(item, nn.Embedding)]
    if sizes:
        check_range(name, tokens[:, :-1], max(sizes))
