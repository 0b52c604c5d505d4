"""Sources behind a URL, s3://, https:// and whatever else fsspec knows.

Packing reads its files in pieces, in any order and by any rank, and asks for their sizes first. So
they are copied, each by one rank and once, to a folder beside the one that is packed to, which a
restart goes on with and which is gone at the end. Zarr stores alone are read where they are: of
theirs a few variables are wanted, and every chunk is an object of its own.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import xxhash

from hpctrain.convert.parallel import Progress
from hpctrain.convert.sources.source import Samples, Source, is_url, optional
from hpctrain.data.arrays import Int64s
from hpctrain.data.dataset import Field
from hpctrain.errors import DatasetError
from hpctrain.topology import Communicator, on_all_ranks
from hpctrain.utils.files import replacement
from hpctrain.utils.internet import network_failure

_SECRET = re.compile(r"\?.*$|(?<=://)[^/@]*@")
"""What a URL has of passwords and signatures."""
_MAGIC = re.compile(r"[*?\[]")


@dataclass(frozen=True, slots=True)
class Copy:
    """One file.

    Attributes:
        url: where it is.
        path: below the folder of the copies.
        size: bytes; None: the server does not tell.
        version: what changes with it, as far as the server tells.
    """

    url: str
    path: str
    size: int | None
    version: str


@dataclass(frozen=True, slots=True)
class Listing:
    """What is to be copied, for a source.

    Attributes:
        name: of the source, without passwords.
        copies: of all its files.
        patterns: by URL as it was given, the pattern below the folder of the copies that finds its.
    """

    name: str
    copies: tuple[Copy, ...]
    patterns: Mapping[str, str]

    @property
    def identity(self) -> str:
        """Changes when a file does, or another is there."""
        digest = xxhash.xxh3_64()
        for copy in self.copies:
            digest.update(f"{copy.path}\0{copy.size}\0{copy.version}\n".encode())
        return str(digest.hexdigest())


@dataclass(frozen=True)
class Fetched:
    """A source of copies, called by what they are copies of.

    Attributes:
        source: of the copies.
        name: of what they were made from.
        identity: of the same.
    """

    source: Source
    name: str
    identity: str

    @property
    def samples(self) -> int:
        return self.source.samples

    @property
    def fields(self) -> Mapping[str, Field]:
        return self.source.fields

    @property
    def attributes(self) -> Mapping[str, Mapping[str, Any]]:
        return self.source.attributes

    def read(self, rows: Int64s) -> Samples:
        """Return samples, as `Source.read` does."""
        return self.source.read(rows)


def public(text: str) -> str:
    """Return a URL without what it has of passwords and signatures."""
    return _SECRET.sub("", text) if is_url(text) else text


def listed(name: str, urls: Sequence[str]) -> Listing:
    """Find out which files are behind URLs, each a file, a folder or a pattern.

    Args:
        name: of the source.
        urls: to look behind.

    Raises:
        DatasetError: if there are none, a server cannot be asked, or a library is missing.
    """
    copies: list[Copy] = []
    patterns = {}
    for url in urls:
        own = f"{xxhash.xxh3_64_hexdigest(url.encode())[:8]}"
        found, pattern = _behind(url)
        patterns[url] = f"{own}/{pattern}" if pattern else own
        copies += [copy_at(each, f"{own}/{path}") for each, path in found]
    return Listing(name, tuple(copies), patterns)


def file_system(url: str) -> tuple[Any, str]:
    """Return the file system that a URL is of, and what it calls the place.

    Raises:
        DatasetError: if there is none, or its library is missing.
    """
    scheme = url.partition("://")[0]
    fsspec = optional("fsspec", "remote", f"{scheme}:// is")
    try:
        system, place = fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise DatasetError(
            f"{public(url)}: {scheme}:// needs a library that is not installed: {error}. "
            "pip install 'hpctrain[remote]' brings those of s3:// and https://"
        ) from error
    except ValueError as error:
        raise DatasetError(f"{public(url)}: {error}") from error
    return system, place


def _behind(url: str) -> tuple[list[tuple[str, str]], str]:
    """Return the files of a URL, each with where to put it, and what finds them there."""
    system, place = file_system(url)
    with asking(url):
        if _MAGIC.search(place.partition("?")[0] if url.startswith("http") else place):
            head, rest = _parts(place)
            files = [each for each in system.glob(place) if not system.isdir(each)]
            found = [(each, unquote(each[len(head) :])) for each in files]
            pattern = unquote(rest)
        elif not url.endswith("/") and system.isfile(place):
            name = unquote(re.split(r"[?#]", place.rpartition("/")[2])[0])
            found, pattern = [(place, name)], name
        else:
            head = place.rstrip("/") + "/"
            found = [(each, unquote(each[len(head) :])) for each in system.find(place)]
            pattern = ""
            if not found:
                system.info(place)  # which tells a server that does not answer from an empty one
    if not found:
        raise DatasetError(f"{public(url)}: no file has such a name there")
    for each, path in found:
        if ".." in Path(path).parts or Path(path).is_absolute():
            raise DatasetError(f"{public(url)}: the server lists {each}, which is elsewhere")
    return [(system.unstrip_protocol(each), path) for each, path in sorted(found)], pattern


def _parts(place: str) -> tuple[str, str]:
    """Return the folder that a pattern begins in, and what is a pattern."""
    match = _MAGIC.search(place)
    assert match is not None
    head = place[: place.rfind("/", 0, match.start()) + 1]
    return head, place[len(head) :]


def copy_at(url: str, path: str) -> Copy:
    """Return what a server tells of a file."""
    system, place = file_system(url)
    with asking(url):
        about = system.info(place)
    version = next(
        (str(about[key]) for key in ("ETag", "etag", "mtime", "LastModified") if about.get(key)), ""
    )
    return Copy(url, path, about.get("size"), version)


@contextmanager
def fetched(
    listing: Listing, beside: Path, communicator: Communicator, progress: Progress
) -> Iterator[Mapping[str, str]]:
    """Copy files, each by one rank, and give the patterns that find them, by URL. Collective.

    The copies are removed after the body; after an exception they stay, and whoever begins again
    goes on from there.

    Args:
        listing: what to copy.
        beside: the folder beside which the copies are to be.
        communicator: of all ranks.
        progress: is told how many files this rank has copied.

    Raises:
        DatasetError: on all ranks, if a file cannot be read, or there is no room for it.
    """
    home = beside.with_name(f".{beside.name}-copies")
    folder = home / listing.identity
    mine = listing.copies[communicator.rank :: communicator.world_size]

    def make() -> None:
        for done, copy in enumerate(mine):
            progress(done, len(mine))
            fetch(copy, folder / copy.path)

    on_all_ranks(communicator, make)
    yield {url: str(folder / pattern) for url, pattern in listing.patterns.items()}
    if communicator.rank == 0:
        shutil.rmtree(home, ignore_errors=True)


def fetch(copy: Copy, path: Path) -> None:
    """Copy a file; under its name it is there whole or not at all.

    Raises:
        DatasetError: if it cannot be read, or is not what the server said.
    """
    if path.exists():
        return
    system, place = file_system(copy.url)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacement(path) as temporary:
            with asking(copy.url):
                system.get_file(place, str(temporary))
            there = temporary.stat().st_size
            if copy.size is not None and there != copy.size:
                raise DatasetError(
                    f"{public(copy.url)}: {there} bytes came, and the server said {copy.size}: "
                    "begin again"
                )
            # A copy that is made again is to be the same file to whoever goes on.
            stamp = xxhash.xxh3_64_intdigest(copy.version.encode()) % 2**60
            os.utime(temporary, ns=(stamp, stamp))
    except OSError as error:
        raise DatasetError(f"{path.parent}: cannot write here: {error.strerror}") from error


@contextmanager
def asking(url: str) -> Iterator[None]:
    """Explain what a library makes of a server that does not answer, or says no.

    Raises:
        DatasetError: naming the URL, if the body fails.
    """
    try:
        yield
    except DatasetError:
        raise
    except Exception as error:  # each library has its own
        what = (str(error) or type(error).__name__).replace(url, public(url))
        # Of a server that does not answer, fsspec says the same as of a file that is not there.
        if isinstance(error, FileNotFoundError) and network_failure(error) is None:
            raise DatasetError(f"{public(url)}: no file has such a name there") from error
        raise DatasetError(f"{public(url)}: cannot be read: {what}") from error
