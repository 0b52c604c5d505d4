"""`data pack` in this process, and what it has packed."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from hpctrain.convert import commands
from hpctrain.convert.options import declare
from hpctrain.convert.parallel import silent
from hpctrain.data.decoding import decoded_rows, decodings
from hpctrain.data.files.discovery import open_dataset
from hpctrain.data.reading.rows import read_rows
from hpctrain.launch.communicators import SingleCommunicator


def run(*arguments: str) -> str:
    """Pack, and return what is said at the end."""
    parser = argparse.ArgumentParser()
    declare(parser)
    return commands.pack(parser.parse_args(["pack", *arguments]), SingleCommunicator(), silent)


def packed_values(folder: Path) -> dict[str, np.ndarray]:
    """Return all values of a dataset, as training gets them."""
    dataset = open_dataset(str(folder))
    rows = np.arange(dataset.samples)
    return decoded_rows(read_rows(dataset, rows), rows, decodings([dataset])[0])
