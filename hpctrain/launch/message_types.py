"""Which classes may be part of a message between ranks: the closed set of `messages`.

They only hold values: dataclasses, named tuples, enums, and hpctrain's errors.
"""

from __future__ import annotations

import importlib
from dataclasses import fields, is_dataclass
from typing import Any

_NAMES = {
    "checkpoint.format": "UnreadableError Spread",
    "checkpoint.load": "Rows",
    "checkpoint.safetensors_files": "RawTensor Written",
    "checkpoint.state": "UnsavableError",
    "config.fields": "Normalization",
    "config.schema": (
        "RunSection ComponentSection TaskSection ParameterGroup OptimizerSection SchedulerSection "
        "TrainingSection CheckpointSection LaunchSection LoggingSection EarlyStoppingSection "
        "ProfileSection NotifySection Config"
    ),
    "config.schema_job": "JobSection",
    "config.schema_data": "FieldTable SamplesTable SourceTable DataSection",
    "config.semantics": "Semantics",
    "data.coding": "Coding",
    "data.dataset": "Field Layout Shard SourceFacts Dataset",
    "data.decoding": "FieldDecoding",
    "data.forms": "Form",
    "data.view": "Part Column View",
    "data.order.ragged": "Heap Lengths Packing Raggedness",
    "data.order.selection": "Spans SampleSelection",
    "convert.sources.images": "EncodedImages ImageFolder",
    "convert.sources.indexed": "Indexed",
    "convert.sources.objects": "ObjectSource SpooledStream",
    "convert.sources.remote": "Copy Fetched Listing",
    "convert.sources.source": "ArrayFacts Converted",
    "convert.sources.table": "Part Table",
    "convert.sources.text": "Text Piece Tokens Vocabulary",
    "convert.pack": "Written Output Plan",
    "errors": (
        "ExitCode UsageError ConfigError LaunchError DatasetError CheckpointError OutputError "
        "TrainingError"
    ),
    "launch.device": "Cores Place Owner",
    "launch.placement": "Node",
    "launch.rendezvous": "Address",
    "preflight.checks": "Answer",
    "preflight.compute": "StepFacts",
    "preflight.data": "Reading",
    "preflight.network": "Lookup",
    "preflight.numbers": "NumberFacts",
    "preflight.quotas": "Quota Quotas",
    "preflight.rank_facts": "RankFacts",
    "preflight.reductions": "Reduction Wrong",
    "preflight.storage": "FolderFacts",
    "training.metrics": "Part",
    "training.modules.run_logger": "MissingLoggerError",
    "training.data.staging": "NodeStage",
    "training.parallel.fsdp_units": "Findings",
}
NAMES = frozenset(
    f"hpctrain.{module}:{name}" for module, names in _NAMES.items() for name in names.split()
)
"""Classes as messages name them, MODULE:CLASS."""


class ClassTable:
    """The classes of the listed modules, by the names that they have in messages."""

    def __init__(self) -> None:
        self._names: dict[type, bytes] = {}
        self._found: dict[bytes, tuple[type[Any], tuple[str, ...]]] = {}

    def name_of(self, kind: type) -> bytes:
        """Return the name of a class.

        Raises:
            TypeError: if it may not be part of a message.
        """
        name = self._names.get(kind)
        if name is None:
            name = f"{kind.__module__}:{kind.__qualname__}".encode()
            try:
                found = self.find(name)[0]
            except ValueError:
                found = None
            if found is not kind:
                raise TypeError(
                    f"{kind.__module__}.{kind.__qualname__} cannot be part of a message between "
                    "ranks: hpctrain/launch/message_types.py lists the classes that can"
                )
            self._names[kind] = name
        return name

    def find(self, name: bytes) -> tuple[type[Any], tuple[str, ...]]:
        """Return the class of a name, and the names of its fields.

        Raises:
            ValueError: if there is none that may be part of a message.
        """
        entry = self._found.get(name)
        if entry is None:
            text = name.decode("ascii")
            if text not in NAMES:
                raise ValueError("a class that is not listed")
            module, _, kind_name = text.partition(":")
            kind: Any = getattr(importlib.import_module(module), kind_name)
            entry = self._found[name] = kind, _field_names(kind)
        return entry


def _field_names(kind: Any) -> tuple[str, ...]:
    if is_dataclass(kind):
        return tuple(field.name for field in fields(kind))
    return tuple(getattr(kind, "_fields", ()))
