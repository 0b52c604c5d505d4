"""What a config says of torch Datasets and datamodules, and what it must not say beside them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from hpctrain.config.importing import is_reference, problem_of
from hpctrain.config.messages import KeyPath, Mistake
from hpctrain.config.schema import DataSection
from hpctrain.config.toml import Source

_OF_FILES = (
    *("file_order", "decode", "verify", "fields", "samples", "stage", "stage_directory"),
    *("normalize", "sample_transform", "transform", "cache", "max_tokens"),
)
"""Keys that say how files are read; what becomes of a sample, a torch Dataset does by itself."""


def may_be_object(key: KeyPath) -> bool:
    """Tell whether a key names files, or the import path of what makes a Dataset."""
    kept = (("data", "train"), ("data", "validation"), ("data", "test"))
    return key in kept or key[:2] == ("data", "evaluations")


def names_object(value: object) -> bool:
    """Tell whether a value of `data.train` is an import path, and no file of that name."""
    return isinstance(value, str) and is_reference(value) and not Path(value).exists()


def check_objects(source: Source) -> list[Mistake]:
    """Check what makes torch Datasets, and that nothing is said of files beside it."""
    data = source.get("data")
    if not isinstance(data, dict):
        return []
    use, is_object = data.get("use"), names_object(data.get("train"))
    mistakes = _check_arguments(source, data)
    if isinstance(use, str) and use:
        expected = 'expected an import path "package.module:Name" of a LightningDataModule'
        problem = problem_of(use) if is_reference(use) else expected
        if problem is not None:
            mistakes.append(source.mistake(("data", "use"), problem))
        for name in ("train", "validation"):
            if data.get(name):
                problem = "data.use makes the datasets: leave one of the two out"
                mistakes.append(source.mistake(("data", name), problem))
    mistakes += _check_evaluations(source, data, are_objects=is_object or bool(use))
    if not is_object and not use:
        if data.get("workers") == 0:
            problem = "0 is for torch Datasets; expected a whole number from 1"
            mistakes.append(source.mistake(("data", "workers"), problem))
        return mistakes
    for name in _OF_FILES:
        if not _is_default(name, data.get(name)):
            problem = "is of files; a torch Dataset does by itself what is to be done"
            mistakes.append(source.mistake(("data", name), problem))
    weights = data.get("weights")
    if isinstance(weights, str) and not weights.lower().endswith(".npy"):
        problem = "of torch Datasets they are a .npy file of one number a sample, or the sampler's"
        mistakes.append(source.mistake(("data", "weights"), problem))
    validation = data.get("validation")
    if is_object and validation and not names_object(validation):
        problem = "data.train is an import path, and so has data.validation to be"
        mistakes.append(source.mistake(("data", "validation"), problem))
    return mistakes


def _check_evaluations(source: Source, data: dict[str, Any], *, are_objects: bool) -> list[Mistake]:
    """Check that further data to evaluate with are of the kind that is trained with."""
    further = data.get("evaluations")
    what = "an import path" if are_objects else "of files"
    return [
        source.mistake(
            ("data", "evaluations", name),
            f"data.train is {what if not data.get('use') else 'made by data.use'}, and so these "
            f"have to be {'an import path of a torch Dataset' if are_objects else what}",
        )
        for name, value in (further.items() if isinstance(further, dict) else ())
        if isinstance(value, str) and names_object(value) != are_objects
    ]


def _check_arguments(source: Source, data: dict[str, Any]) -> list[Mistake]:
    """Check that arguments have something to go to."""
    takers = {"arguments": "use", "train_arguments": "train", "validation_arguments": "validation"}
    return [
        source.mistake(("data", name), f"there is no import path in data.{of} that takes them")
        for name, of in takers.items()
        if data.get(name) and not names_object(data.get(of))
    ]


def _is_default(name: str, value: Any) -> bool:
    """Tell whether a key says what is so without it, as a saved config writes it out."""
    default = getattr(DataSection(), name)
    if value is None or value == default:
        return True
    if isinstance(value, dict) and dataclasses.is_dataclass(default):
        own = dataclasses.asdict(default)  # type: ignore[arg-type]
        return all(own.get(key) == given for key, given in value.items())
    return False
