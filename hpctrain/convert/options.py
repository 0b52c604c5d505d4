"""`python -m hpctrain data TOOL`: the tools, their options, and what the values of these mean.

To declare them reads no file.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from hpctrain.convert import commands
from hpctrain.convert.commands import Work
from hpctrain.convert.pack import parse_splits
from hpctrain.data.dataset import SUPPORTED_DTYPES
from hpctrain.data.files.storage import CHUNK_BYTES, FILTERS, Storage
from hpctrain.data.writer import SHARD_BYTES
from hpctrain.errors import UsageError

COLLECTIVE = frozenset({"pack", "split", "repack"})
"""Tools that all ranks of a job share; of the others rank 0 does all."""
T = TypeVar("T")
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}
_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?([kmg]i?|)b?", re.IGNORECASE)
_PIXELS = re.compile(r"(\d+)x(\d+)")
_LIMITS = re.compile(r"([^=]+)=(-?[\d.e+-]+):(-?[\d.e+-]+)")


def declare(parser: argparse.ArgumentParser) -> Mapping[str, argparse.ArgumentParser]:
    """Give a parser the tools.

    Returns:
        By name, the parser of each tool's options, which also sets `work`: what it does.
    """
    tools = parser.add_subparsers(dest="tool", metavar="TOOL", required=True)

    def tool(name: str, work: Work, what: str) -> argparse.ArgumentParser:
        made = tools.add_parser(name, add_help=True, description=what, help=what)
        made.set_defaults(work=work)
        return made

    packing = tool(
        "pack", commands.pack, "Pack arrays, images, text, HDF5 or a torch Dataset to shards."
    )
    packing.add_argument(
        "source",
        nargs="+",
        help="[NAME=]FILES[:FIELD]: .npy, .npz, IDX, HDF5, text, a folder of images; or: digits; "
        "or the import path of what makes a torch Dataset: dataset=my_data:make",
    )
    _declare_output(packing)
    _declare_reading(packing)

    splitting = tool("split", commands.again, "Split a dataset in parts, at random.")
    splitting.add_argument("source", help="a folder of shards, or a pattern of HDF5 files")
    _declare_output(splitting, needs_split=True)

    storing = tool("repack", commands.again, "Store a dataset anew, contiguous by default.")
    storing.add_argument("source", help="a folder of shards, or a pattern of HDF5 files")
    _declare_output(storing)

    telling = _declare_dataset(tool("info", commands.info, "Tell what a dataset holds."))
    telling.add_argument("--json", action="store_true", help="for scripts")

    listing = _declare_dataset(
        tool("index", commands.index, "Write index.json for HDF5 files, without a copy."),
        jobs=True,
    )
    listing.add_argument(
        "--out",
        type=Path,
        metavar="FILE.json",
        help="list any files in this one, to be named in data.train; left out: their index.json",
    )
    listing.add_argument("--no-checksums", action="store_true", help="don't read the files whole")

    checking = _declare_dataset(tool("verify", commands.verify, "Look for all damage."), jobs=True)
    checking.add_argument(
        "--range",
        action="append",
        default=[],
        type=limits,
        metavar="FIELD=LEAST:LARGEST",
        help="no value of this field may be outside, such as label=0:9",
    )
    checking.add_argument(
        "--allow-nan",
        default=[],
        type=names,
        metavar="FIELDS",
        help="these may hold NaN and Inf",
    )

    measuring = _declare_dataset(
        tool("stats", commands.stats, "Mean, deviation, range of each channel."),
        jobs=True,
    )
    measuring.add_argument(
        "--out", type=Path, help="file to write; left out: stats.json in the folder of the dataset"
    )

    for reading in (checking, measuring):
        reading.add_argument(
            "--stored",
            action="store_true",
            help="take numbers as stored, whatever _FillValue, scale_factor and the like say",
        )

    timing = _declare_dataset(tool("bench", commands.bench, "Time file system and dataset."))
    timing.add_argument("--batch", type=count, default=256, help="samples (256)")
    timing.add_argument("--seconds", type=count, default=3, help="of one turn; there are six (3)")
    timing.add_argument("--buffer-mb", type=count, default=512, help="memory (512)")
    timing.add_argument("--cold", action="store_true", help="empty the page cache before each turn")
    timing.add_argument("--json", action="store_true", help="for scripts")

    return tools.choices


def _declare_dataset(
    parser: argparse.ArgumentParser, jobs: bool = False
) -> argparse.ArgumentParser:
    parser.add_argument("dataset", help="a folder of shards, or a pattern of HDF5 files")
    parser.add_argument("--fields", type=names, help="such as image,label; all")
    if jobs:
        parser.add_argument("--jobs", type=count, default=0, help="processes; one a core")
    return parser


def _declare_output(parser: argparse.ArgumentParser, needs_split: bool = False) -> None:
    parser.add_argument("folder", type=Path, help="new, or where packing was interrupted")
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--shard-size",
        type=num_bytes,
        default=SHARD_BYTES,
        metavar="SIZE",
        help="values in one shard, about (256MiB)",
    )
    size.add_argument("--shard-rows", type=count, metavar="ROWS", help="samples in one shard")
    parser.add_argument(
        "--split",
        type=explained(parse_splits),
        default={},
        required=needs_split,
        metavar="NAME=FRACTION,...",
        help="such as train=0.9,validation=0.1, each to a folder of its own",
    )
    parser.add_argument("--seed", type=seed, default=0, help="of --split and --shuffle (0)")
    parser.add_argument("--shuffle", action="store_true", help="write in a random order")
    parser.add_argument(
        "--filter",
        type=explained(Storage.parse),
        default=Storage(),
        metavar="NAME[:LEVEL]",
        help=f"compress: {', '.join(FILTERS)}",
    )
    parser.add_argument(
        "--chunk",
        type=num_bytes,
        default=0,
        metavar="SIZE",
        help=f"values in one chunk, about ({CHUNK_BYTES // 2**10}KiB with a filter)",
    )


def _declare_reading(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--axis",
        action="append",
        default=[],
        type=axis,
        metavar="[FIELD=]AXIS",
        help="of the samples (0); none: each array of a pattern is one",
    )
    parser.add_argument(
        "--dtype",
        action="append",
        default=[],
        type=dtype,
        metavar="FIELD=DTYPE",
        help="store as, if every value fits",
    )
    parser.add_argument("--size", type=pixels, help="scale images, such as 224x224")
    parser.add_argument("--grey", action="store_true", help="images in one channel")
    parser.add_argument(
        "--encoded",
        action="store_true",
        help="keep the bytes of files of images, to be decoded beside the training",
    )
    parser.add_argument(
        "--tokens",
        type=count,
        help="tokens of text in one sample (1025), bytes without --tokenizer; any file is text",
    )
    parser.add_argument(
        "--tokenizer", metavar="TOKENIZER.json", help="turn text into tokens by this file"
    )
    parser.add_argument(
        "--end-of-text",
        metavar="TOKEN",
        help="that ends each text; left out, as tokenizer_config.json beside the tokenizer says",
    )


def explained(convert: Callable[[str], T]) -> Callable[[str], T]:
    """Return a converter whose UsageErrors argparse tells with the name of the option."""

    def converter(text: str) -> T:
        try:
            return convert(text)
        except UsageError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return converter


@explained
def num_bytes(text: str) -> int:
    """Return the bytes of a size such as 512, 64MB or 1GiB."""
    match = _SIZE.fullmatch(text)
    if match is None or not float(match[1]):
        raise UsageError(f"{text}: write a size as 256MiB or 1GB")
    return int(float(match[1]) * _UNITS[match[2].lower()])


@explained
def count(text: str) -> int:
    """Return a number of things, at least one."""
    if not text.isdecimal() or int(text) == 0:
        raise UsageError(f"{text}: this has to be a whole number above 0")
    return int(text)


@explained
def seed(text: str) -> int:
    """Return a seed, 0 to 2**64 - 1."""
    if not text.isdecimal() or int(text) >= 2**64:
        raise UsageError(f"{text}: a seed is a whole number from 0 to 2**64 - 1")
    return int(text)


@explained
def names(text: str) -> list[str]:
    """Return the names of a list such as image,label."""
    found = [name.strip() for name in text.split(",")]
    if not all(found):
        raise UsageError(f"{text}: write fields as image,label")
    return found


@explained
def pixels(text: str) -> tuple[int, int]:
    """Return the rows and columns of a text such as 224x224."""
    match = _PIXELS.fullmatch(text)
    if match is None or "0" in match.groups():
        raise UsageError(f"{text}: write rows and columns as 224x224")
    return int(match[1]), int(match[2])


@explained
def axis(text: str) -> tuple[str, int | None]:
    """Return field and axis of a text such as temperature=1; a number alone is for all others."""
    field, _, number = text.rpartition("=")
    if number == "none":
        return field, None
    if not re.fullmatch(r"-?\d+", number):
        raise UsageError(f"{text}: write an axis as 1, or as temperature=1")
    return field, int(number)


@explained
def dtype(text: str) -> tuple[str, np.dtype[Any]]:
    """Return field and dtype of a text such as label=int64."""
    field, _, name = text.partition("=")
    if not field or name not in SUPPORTED_DTYPES:
        raise UsageError(f"{text}: write a dtype as label=int64, one of {_joined_dtypes()}")
    return field, np.dtype(name)


@explained
def limits(text: str) -> tuple[str, tuple[float, float]]:
    """Return field and range of a text such as label=0:9."""
    match = _LIMITS.fullmatch(text)
    try:
        if match is None:
            raise ValueError
        least, largest = float(match[2]), float(match[3])
        if least > largest:
            raise ValueError
    except ValueError:
        raise UsageError(f"{text}: write a range as label=0:9") from None
    return match[1], (least, largest)


def _joined_dtypes() -> str:
    return ", ".join(sorted(SUPPORTED_DTYPES))
