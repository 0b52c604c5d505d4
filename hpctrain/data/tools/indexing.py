"""An index for HDF5 files that were there before: once, without a copy."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from hpctrain.data.dataset import Dataset
from hpctrain.data.discovery import find_files, join_files, require_finished
from hpctrain.data.files import file_checksum
from hpctrain.data.index import HDF5_SUFFIXES, INDEX_NAME, file_problems, is_shard_name, write_index
from hpctrain.data.parallel import each, processors
from hpctrain.data.shard_file import cannot_write
from hpctrain.data.tools.progress import Progress, silent
from hpctrain.errors import DatasetError


def make_index(
    pattern: str,
    fields: Sequence[str] | None = None,
    *,
    jobs: int = 0,
    progress: Progress = silent,
) -> Dataset:
    """Write the index of files that are in one folder, in the place of one that is there.

    Args:
        pattern: a folder of HDF5 files, one such file, or a glob of all in one folder.
        fields: paths of the HDF5 datasets to list, their first axis the samples; None: all.
        jobs: processes at the same time; 0: one a processor.
        progress: is told how many files are done.

    Raises:
        DatasetError: if the files do not fit together or cannot be read, are not all of the HDF5
            files of one folder, or the folder cannot be written to.
    """
    require_finished(Path(pattern))
    paths = find_files(pattern)
    folder = _folder_of(pattern, paths)
    # Without the index: it may be older than its files, and then this is the way to a new one.
    dataset = join_files(str(folder), paths, fields)
    problems = file_problems(dataset, folder)
    if problems:
        raise DatasetError(next(iter(problems.values())))
    checksums: dict[int, str] = {}
    progress(0, len(paths))
    for index, result in each(file_checksum, paths, jobs or processors()):
        if isinstance(result, BrokenProcessPool):
            raise result
        checksums[index] = result
        progress(len(checksums), len(paths))
    shards = tuple(
        dataclasses.replace(shard, checksum=checksums[index])
        for index, shard in enumerate(dataset.shards)
    )
    indexed = dataclasses.replace(dataset, shards=shards)
    try:
        write_index(indexed, folder)
    except OSError as error:
        raise cannot_write(folder, error) from error
    return indexed


def _folder_of(pattern: str, paths: Sequence[str]) -> Path:
    """Return the one folder that files are in."""
    folders = sorted({str(Path(path).parent) for path in paths})
    if len(folders) > 1:
        raise DatasetError(
            f"{pattern}: these files are in {len(folders)} folders ({folders[0]}, {folders[1]}, "
            f"...), and an index lists one: make one for each, or move them together"
        )
    for path in paths:
        if not is_shard_name(Path(path).name):
            raise DatasetError(
                f"{path}: an index lists files that are named *{', *'.join(HDF5_SUFFIXES)}: "
                "rename it, or make a link to it that is named so"
            )
    there = {entry.name for entry in Path(folders[0]).iterdir() if is_shard_name(entry.name)}
    surplus = sorted(there - {Path(path).name for path in paths})
    if surplus:
        raise DatasetError(
            f"{folders[0]}: {INDEX_NAME} lists all HDF5 files of its folder, and {pattern} leaves "
            f"out {', '.join(surplus[:5])}: name the folder, or move them away"
        )
    return Path(folders[0])
