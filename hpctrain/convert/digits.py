"""The dataset that comes with the first run: real handwritten digits, without a download."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hpctrain.data.dataset import Dataset
from hpctrain.data.files.discovery import open_dataset
from hpctrain.data.files.index import INDEX_NAME, damaged_shards
from hpctrain.data.order.permutation import derive_key, permutation
from hpctrain.data.writer import Writer
from hpctrain.errors import DatasetError
from hpctrain.utils.files import temporary_name

SPLITS = ("train", "validation")
VALIDATION_FRACTION = 0.2
SPLIT_SEED = 0
SHARD_BYTES = 48 * 2**10
"""Small, so that even these data make several shards."""
BRIGHTEST = 16.0
ATTRIBUTES = {
    "image": {
        "description": "scan of a handwritten digit: channel, row, column",
        "units": "brightness, 0 to 1",
    },
    "label": {"description": "the digit, 0 to 9"},
}


def pack_digits(folder: Path) -> str:
    """Pack scikit-learn's handwritten digits to `folder/train` and `folder/validation`.

    Samples: image (1, 8, 8) float32, 0 to 1, and label () int64. Every label is split in the same
    proportion, by a fixed seed. The same bytes come out every time. Where the data are already,
    and whole, nothing is done.

    Returns:
        What was done, one line.

    Raises:
        DatasetError: if scikit-learn is not installed, or something else is in the way.
    """
    try:
        is_new = not folder.exists() or not any(folder.iterdir())
    except OSError as error:
        raise DatasetError(f"{folder}: {error.strerror}") from error
    if not is_new:
        found = [_require_whole(folder / split) for split in SPLITS]
        return f"{folder}: the digits are packed already: {_summary(found)}."
    images, labels = _load()
    chosen = _validation_mask(labels)
    # Both splits appear at once, by the rename of one folder: a packer that is killed leaves
    # nothing that looks like a dataset.
    temporary = temporary_name(folder.absolute())
    try:
        for split, mask in zip(SPLITS, (~chosen, chosen), strict=True):
            with Writer(temporary / split, shard_bytes=SHARD_BYTES, attributes=ATTRIBUTES) as out:
                out.extend({"image": images[mask], "label": labels[mask]})
        temporary.replace(folder)
    except OSError as error:
        raise DatasetError(f"{folder}: cannot write here: {error.strerror}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    written = [open_dataset(str(folder / split)) for split in SPLITS]
    return f"{folder}: packed {_summary(written)}."


def _load() -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Return all scans, (samples, 1, 8, 8) float32 0 to 1, and their labels, (samples,) int64."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DatasetError(
            "the digits come with scikit-learn, which is not installed: "
            "pip install 'hpctrain[digits]'"
        ) from error
    digits: Any = load_digits()
    images = (digits.images / BRIGHTEST).astype(np.float32)[:, None]
    return images, digits.target.astype(np.int64)


def _validation_mask(labels: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Return which samples are for validation: of each label the same fraction."""
    mask = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        shuffled = members[permutation(derive_key(SPLIT_SEED, int(label)), len(members))]
        mask[shuffled[: round(len(members) * VALIDATION_FRACTION)]] = True
    return mask


def _require_whole(folder: Path) -> Dataset:
    """Return the dataset in a folder, if every byte of it is there.

    Raises:
        DatasetError: if it is not.
    """
    if not (folder / INDEX_NAME).exists():
        raise DatasetError(
            f"{folder}: there is no dataset here, yet {folder.parent} is not empty. "
            "Remove it, or pack to another folder"
        )
    dataset = open_dataset(str(folder))
    damaged = damaged_shards(dataset)
    if damaged:
        raise DatasetError(
            f"{damaged[0]}: the checksum is not that of {INDEX_NAME}: the file is damaged. "
            f"Remove {folder.parent} and pack again"
        )
    return dataset


def _summary(datasets: list[Dataset]) -> str:
    return ", ".join(
        f"{split} {dataset.samples} samples in {len(dataset.shards)} shards"
        for split, dataset in zip(SPLITS, datasets, strict=True)
    )
