"""An index for HDF5 files that were there before: once, without a copy."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NoReturn

from hpctrain.convert.parallel import Progress, for_each, silent
from hpctrain.data.dataset import Dataset
from hpctrain.data.files.catalogue import CATALOGUE_SUFFIX, write_catalogue
from hpctrain.data.files.contents import Contents, look_into
from hpctrain.data.files.discovery import find_files, join_files, require_finished
from hpctrain.data.files.index import (
    HDF5_SUFFIXES,
    INDEX_NAME,
    file_problems,
    is_shard_name,
    write_index,
)
from hpctrain.data.writer import cannot_write
from hpctrain.errors import DatasetError, UsageError
from hpctrain.utils.files import file_checksum


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
    _require_as_stored(name for name, field in dataset.fields.items() if field.form is not None)
    problems = file_problems(dataset, folder)
    if problems:
        raise DatasetError(next(iter(problems.values())))
    checksums = _checksums(paths, jobs, progress)
    shards = tuple(
        dataclasses.replace(shard, checksum=checksum)
        for shard, checksum in zip(dataset.shards, checksums, strict=True)
    )
    indexed = dataclasses.replace(dataset, shards=shards)
    try:
        write_index(indexed, folder)
    except OSError as error:
        refused = cannot_write(folder, error)
        raise DatasetError(f"{refused}. `--out FILE.json` lists the files elsewhere") from error
    return indexed


def make_catalogue(
    pattern: str,
    out: Path,
    fields: Sequence[str] | None = None,
    *,
    checksums: bool = True,
    jobs: int = 0,
    progress: Progress = silent,
) -> list[Contents]:
    """Write a catalogue of files that may be anywhere, with whatever rows.

    Args:
        pattern: a folder of HDF5 files, one such file, or a glob.
        out: file to write.
        fields: paths of the HDF5 datasets to list; None: all.
        checksums: read the files whole, so that `data.verify` can find damage.
        jobs: processes at the same time; 0: one a processor.
        progress: is told how many files are done.

    Raises:
        UsageError: if the file to write has a name that means something else.
        DatasetError: if a file cannot be read, or the catalogue cannot be written.
    """
    if out.name == INDEX_NAME or out.suffix != CATALOGUE_SUFFIX:
        raise UsageError(f"{out}: name it *{CATALOGUE_SUFFIX}, other than {INDEX_NAME}")
    paths = find_files(pattern)
    files = [look_into(path, fields) for path in paths]
    for file in files:
        _require_as_stored(name for name, each in file.arrays.items() if each.form is not None)
    if checksums:
        files = [
            dataclasses.replace(file, checksum=checksum)
            for file, checksum in zip(files, _checksums(paths, jobs, progress), strict=True)
        ]
    try:
        write_catalogue(out, files)
    except OSError as error:
        raise cannot_write(out.parent, error) from error
    return files


def _require_as_stored(formed: Iterable[str]) -> None:
    """Check that no field to list is made of others: a list tells where values lie in the files.

    Raises:
        UsageError: naming the first.
    """
    for name in formed:
        raise UsageError(
            f"--fields {name}: this is a member of a compound type, and a list has whole HDF5 "
            f'datasets: leave it out. A config names it by path = "{name}", and the files are asked'
        )


def _checksums(paths: Sequence[str], jobs: int, progress: Progress) -> list[str]:
    return for_each(file_checksum, paths, jobs, progress, _crashed)


def _crashed(_: str, error: BrokenProcessPool) -> NoReturn:
    raise error


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
