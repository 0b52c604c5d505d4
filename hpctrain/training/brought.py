"""Objects that a script brings along: each stands in place of what the config names.

The config says all else, and its dataclass and checks are the same, whether a job is made of names
or of objects.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

Prune = Callable[[int, Mapping[str, float]], object]
"""From the step and the metrics of an evaluation to whether the run ends there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Brought:
    """What a job is given ready-made, the same on all ranks; without any, the config names all.

    Attributes:
        model: to train; never copied: it is the caller's own that is trained.
        train: a torch Dataset or DataLoader to train with.
        validation: the same, for evaluation while training; several in a collection.
        evaluations: the same, further ones by name.
        test: the same, for `test`; several in a collection.
        predict: the same, for `predict`; several in a collection.
        datamodule: makes those four.
        callbacks: objects with the hook names of a Lightning Callback.
        accumulated: batches of a DataLoader that make a step.
        loggers: objects that are handed every line of metrics, on rank 0.
        shown_loggers: what a module finds as its loggers; None among them: the run's own.
        notes: lines for the header.
        given: loaders as the user has made them, by what they are for; known once they are asked.
        prune: is asked on rank 0 behind each evaluation, with the step and the metrics, whether the
            run is to end there.
    """

    model: nn.Module | None = None
    train: Any = None
    validation: Any = None
    evaluations: Mapping[str, Any] = field(default_factory=dict)
    test: Any = None
    predict: Any = None
    datamodule: Any = None
    callbacks: Sequence[Any] = ()
    accumulated: int = 1
    loggers: Sequence[Any] = ()
    shown_loggers: Sequence[Any] = (None,)
    notes: Sequence[str] = ()
    given: Mapping[str, Any] = field(default_factory=dict)
    prune: Prune | None = None

    @property
    def sections(self) -> frozenset[str]:
        """The sections of a config whose `use` is not looked at."""
        return frozenset() if self.model is None else frozenset({"model"})


NOTHING = Brought()
"""A job that is made of names alone."""
