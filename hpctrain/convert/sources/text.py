"""Texts as tokens, cut into rows of equal length: one token a byte, or those of a tokenizer file.

Which tokens of a Hugging Face tokenizer a row has depends on how many those of all texts before it
are. So texts are turned into tokens first, in pieces, each by one rank and to a file of its own
that a restart keeps; then rows are cut from the pieces, one after the other. The pieces are cut by
the texts alone: rows are the same at any number of ranks.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from hpctrain.convert.parallel import Progress
from hpctrain.convert.sources.columns import ARROW, PARQUET, text_pieces, texts_in
from hpctrain.convert.sources.source import Arrays, identity_of, optional, reading
from hpctrain.data.arrays import Int64s
from hpctrain.data.dataset import Field
from hpctrain.errors import DatasetError, UsageError
from hpctrain.topology import Communicator, on_all_ranks
from hpctrain.utils.files import file_checksum, open_file, open_regular, replacing
from hpctrain.utils.text import plural

PIECE_BYTES = 8 * 2**20
"""Text that becomes one piece, about: what a rank turns into tokens in one go."""
LARGEST_TEXT_BYTES = 64 * 2**20
"""Of one document, whose tokens are all in memory at once, at a hundred bytes each."""
LINES = (".jsonl", ".ndjson")
DEFAULT_COLUMN = "text"
ENDS = (
    *("<|endoftext|>", "<|end_of_text|>", "<|endofdocument|>", "</s>", "<eos>", "<|eos|>"),
    *("<|im_end|>", "<EOS>", "[EOS]", "[SEP]"),
)
"""How tokenizers call the end of a text, where no tokenizer_config.json lies beside them."""
END_OF_FILE = 0
"""The token between two files; a byte that text does not have."""
DEFAULT_TOKENS = 1025
"""1,024 to predict from, and each one's successor."""


@dataclass(frozen=True)
class Text:
    """The bytes of files, one after the other, cut into rows of equal length.

    Attributes:
        name: what the user called it.
        paths: in their order.
        sizes: of the files, bytes.
        tokens: of one row.
    """

    name: str
    paths: Sequence[str]
    sizes: Sequence[int]
    tokens: int

    @classmethod
    def open(cls, name: str, paths: Sequence[str], tokens: int) -> Text:
        """Find out how long the files are.

        Raises:
            DatasetError: if there is not enough for one row.
        """
        try:
            text = cls(name, paths, [Path(path).stat().st_size for path in paths], tokens)
        except OSError as error:
            raise DatasetError(f"{error.filename}: {error.strerror}") from error
        if text.samples == 0:
            raise DatasetError(
                f"{name}: {text.total} bytes of text do not make one row of {tokens} tokens: "
                "give more text, or fewer tokens (--tokens)"
            )
        return text

    @property
    def total(self) -> int:
        """Tokens of all files, one more after each for its end."""
        return sum(self.sizes) + len(self.sizes)

    @property
    def samples(self) -> int:
        """Whole rows; what is left at the end is not served."""
        return self.total // self.tokens

    @property
    def fields(self) -> Mapping[str, Field]:
        return {"tokens": Field((self.tokens,), np.dtype(np.uint8))}

    @property
    def attributes(self) -> Mapping[str, Mapping[str, Any]]:
        return {"tokens": {"description": "bytes of text; 0 ends a file", "vocabulary_size": 256}}

    @cached_property
    def identity(self) -> str:
        return f"{identity_of(self.paths)} {self.tokens}"

    @cached_property
    def _starts(self) -> Int64s:
        return np.cumsum([0, *(size + 1 for size in self.sizes)], dtype=np.int64)

    def read(self, rows: Int64s) -> Arrays:
        """Return samples, as `Source.read` does."""
        out = np.full((len(rows), self.tokens), END_OF_FILE, np.uint8)
        for begin, stop in _runs(rows):
            self._fill(int(rows[begin]) * self.tokens, memoryview(out[begin:stop].data).cast("B"))
        return {"tokens": out}

    def _fill(self, position: int, out: memoryview) -> None:
        """Copy the tokens from a position on; ends of files are there already."""
        done = 0
        index = int(np.searchsorted(self._starts, position, side="right")) - 1
        while done < len(out):
            offset = position + done - int(self._starts[index])
            count = min(self.sizes[index] - offset, len(out) - done)
            if count > 0:
                self._read(index, offset, out[done : done + count])
            done += max(count, 0) + 1
            index += 1

    def _read(self, index: int, offset: int, out: memoryview) -> None:
        path = self.paths[index]
        try:
            with os.fdopen(open_regular(path), "rb", buffering=0) as file:
                file.seek(offset)
                done = 0
                while done < len(out):
                    count = file.readinto(out[done:])
                    if not count:
                        raise DatasetError(f"{path}: the file has changed while it was packed")
                    done += count
        except OSError as error:
            raise DatasetError(f"{path}: {error.strerror}") from error


@dataclass(frozen=True, slots=True)
class Piece:
    """Some texts: those of a part of a file, or of some files.

    Attributes:
        paths: of the files.
        first: of the one file, its first byte; or its first group of rows.
        stop: one past the last; None: the files are taken whole.
    """

    paths: tuple[str, ...]
    first: int = 0
    stop: int | None = None


class Vocabulary(NamedTuple):
    """What a tokenizer file makes of texts.

    Attributes:
        path: of the file.
        end: number of the token that ends a text.
        size: one more than the largest number of a token.
    """

    path: str
    end: int
    size: int

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(np.uint16 if self.size <= 2**16 else np.int32)


@dataclass(frozen=True)
class Tokens:
    """A source of rows of tokens.

    Attributes:
        name: what the user called the texts.
        vocabulary: of the tokens.
        tokens: of one row.
        paths: of the pieces, each the tokens of its texts.
        counts: tokens of each.
        identity: of the texts, the tokenizer and how rows are cut.
    """

    name: str
    vocabulary: Vocabulary
    tokens: int
    paths: Sequence[str]
    counts: Sequence[int]
    identity: str

    @property
    def samples(self) -> int:
        """Whole rows; what is left at the end is not served."""
        return sum(self.counts) // self.tokens

    @property
    def fields(self) -> Mapping[str, Field]:
        return {"tokens": Field((self.tokens,), self.vocabulary.dtype)}

    @property
    def attributes(self) -> Mapping[str, Mapping[str, Any]]:
        about = {
            "description": f"tokens of {Path(self.vocabulary.path).name}",
            "vocabulary_size": self.vocabulary.size,
            "end_of_text": self.vocabulary.end,
        }
        return {"tokens": about}

    @cached_property
    def _starts(self) -> Int64s:
        return np.cumsum([0, *self.counts], dtype=np.int64)

    def read(self, rows: Int64s) -> Arrays:
        """Return samples, as `Source.read` does."""
        out = np.empty((len(rows), self.tokens), self.vocabulary.dtype)
        for begin, stop in _runs(rows):
            self._fill(int(rows[begin]) * self.tokens, out[begin:stop].reshape(-1))
        return {"tokens": out}

    def _fill(self, position: int, out: npt.NDArray[Any]) -> None:
        """Copy the tokens from a position on."""
        done = 0
        index = int(np.searchsorted(self._starts, position, side="right")) - 1
        while done < len(out):
            offset = position + done - int(self._starts[index])
            count = min(self.counts[index] - offset, len(out) - done)
            with reading(self.paths[index]):
                piece = np.load(self.paths[index], mmap_mode="r", allow_pickle=False)
            out[done : done + count] = piece[offset : offset + count]
            done += count
            index += 1


def vocabulary_of(path: str, end: str | None) -> Vocabulary:
    """Return what a tokenizer file says.

    Args:
        path: of the file, tokenizer.json.
        end: the token that ends a text; None: the one that tokenizer_config.json beside it names,
            or one that is usual.

    Raises:
        DatasetError: if it cannot be read.
        UsageError: if there is no such token, or none that is known to end texts.
    """
    numbers: dict[str, int] = _tokenizer(path).get_vocab(with_added_tokens=True)
    named = end or _configured_end(Path(path).with_name("tokenizer_config.json"))
    if named is not None and named not in numbers:
        raise UsageError(f"{path}: there is no token {named}: name one that is (--end-of-text)")
    if named is None:
        named = next((each for each in ENDS if each in numbers), None)
    if named is None:
        raise UsageError(
            f"{path}: which of its tokens ends a text? No tokenizer_config.json lies beside it "
            "that says so: name it by --end-of-text"
        )
    return Vocabulary(path, numbers[named], max(numbers.values()) + 1)


def _configured_end(path: Path) -> str | None:
    if not path.is_file():
        return None
    with reading(str(path)):
        found = json.loads(path.read_text(encoding="utf-8")).get("eos_token")
    # Either the token itself, or a table of what is known of it.
    named = found.get("content") if isinstance(found, dict) else found
    return named if isinstance(named, str) else None


def _tokenizer(path: str) -> Any:
    library = optional("tokenizers", "text", "tokenizer files are")
    with reading(path), open_file(path) as file:
        found = library.Tokenizer.from_str(file.read().decode("utf-8"))
    # Many files were saved while a model of so many tokens was in use.
    found.no_truncation()
    found.no_padding()
    return found


def pieces_of(paths: Sequence[str]) -> list[Piece]:
    """Cut texts into pieces; which, the files alone decide.

    Raises:
        DatasetError: if a file cannot be read.
    """
    pieces: list[Piece] = []
    whole: list[str] = []
    size = 0
    for path in paths:
        with reading(path):
            own = Path(path).stat().st_size
        is_cut = path.endswith((*LINES, *PARQUET, *ARROW))
        if whole and (is_cut or size + own > PIECE_BYTES):
            pieces.append(Piece(tuple(whole)))
            whole, size = [], 0
        if not is_cut:
            whole.append(path)
            size += own
        elif path.endswith(LINES):
            firsts = range(0, own, PIECE_BYTES)
            pieces += [Piece((path,), first, min(own, first + PIECE_BYTES)) for first in firsts]
        else:
            pieces += [Piece((path,), number, number + 1) for number in range(text_pieces(path))]
    return [*pieces, Piece(tuple(whole))] if whole else pieces


def documents(piece: Piece, column: str) -> Iterator[str]:
    """Yield the texts of a piece.

    Raises:
        DatasetError: naming the file, and its line, if there is no text.
    """
    if piece.stop is None:
        yield from map(_whole_text, piece.paths)
        return
    (path,) = piece.paths
    if path.endswith(LINES):
        yield from _lines(path, piece.first, piece.stop, column)
    else:
        yield from texts_in(path, piece.first, column)


def _whole_text(path: str) -> str:
    with reading(path), open_file(path) as file:
        content = file.read(LARGEST_TEXT_BYTES + 1)
        if len(content) > LARGEST_TEXT_BYTES:
            raise DatasetError(
                f"{path}: a file is one text, and this one has more than "
                f"{LARGEST_TEXT_BYTES // 2**20} MiB: give each text a file of its own, or a line "
                'of a .jsonl file, {"text": "…"}'
            )
        return content.decode("utf-8")


def _lines(path: str, first: int, stop: int, column: str) -> Iterator[str]:
    """Yield the texts of the lines that begin in a part of a file."""
    with open_file(path) as file:
        if first:
            file.seek(first - 1)
            file.readline()
        while (begin := file.tell()) < stop:
            line = file.readline()
            if not line.strip():
                continue
            try:
                found = json.loads(line)[column]
            except (ValueError, KeyError, TypeError) as error:
                found = error
            if not isinstance(found, str):
                raise DatasetError(
                    f'{path}: the line that begins at byte {begin} holds no text "{column}": name '
                    "the key that does, FILES:KEY"
                )
            yield found


@contextmanager
def tokenized(
    name: str,
    pieces: Sequence[tuple[Piece, str]],
    vocabulary: Vocabulary,
    tokens: int,
    *,
    identity: str,
    beside: Path,
    communicator: Communicator,
    progress: Progress,
) -> Iterator[Tokens]:
    """Turn texts into tokens, each piece on one rank, and give the rows of all. Collective.

    The files of the pieces are removed after the body; after an exception they stay, and whoever
    begins again goes on from there.

    Args:
        name: what the user called the texts.
        pieces: of them, each with the column that its texts are in.
        vocabulary: to use.
        tokens: of one row.
        identity: of texts, tokenizer and rows.
        beside: the folder beside which the files are to be.
        communicator: of all ranks.
        progress: is told how many pieces this rank has done.

    Raises:
        DatasetError: on all ranks, if a text cannot be read or there is not enough for one row.
    """
    folder = beside.with_name(f".{beside.name}-tokens")
    paths = [folder / f"{_short(identity)}-{number:06d}.npy" for number in range(len(pieces))]
    rank, ranks = communicator.rank, communicator.world_size

    def make() -> dict[int, int]:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            mine = range(rank, len(pieces), ranks)
            encode = None if not mine else _tokenizer(vocabulary.path)
            counts = {}
            for done, number in enumerate(mine):
                progress(done, len(mine))
                counts[number] = _piece(encode, *pieces[number], vocabulary, paths[number])
            return counts
        except OSError as error:
            raise DatasetError(f"{folder}: cannot write here: {error.strerror}") from error

    counts = {}
    for part in on_all_ranks(communicator, make):
        counts.update(part)
    found = Tokens(
        name,
        vocabulary,
        tokens,
        [str(path) for path in paths],
        [counts[number] for number in range(len(pieces))],
        identity,
    )
    if not found.samples:
        raise DatasetError(
            f"{name}: {plural(sum(counts.values()), 'token')} do not make one row of {tokens}: "
            "give more text, or fewer tokens (--tokens)"
        )
    yield found
    if rank == 0:
        shutil.rmtree(folder, ignore_errors=True)


def _short(identity: str) -> str:
    return identity.partition(" ")[0]


def _piece(tokenizer: Any, piece: Piece, column: str, vocabulary: Vocabulary, path: Path) -> int:
    """Write the tokens of a piece, if they are not there yet, and return how many they are."""
    if path.exists():
        with reading(str(path)):
            return len(np.load(path, mmap_mode="r", allow_pickle=False))
    parts: list[npt.NDArray[Any]] = []
    end = np.array([vocabulary.end], vocabulary.dtype)
    for texts in _batches(documents(piece, column)):
        # Fast: without the place of each token in its text, which nothing here wants.
        encode = getattr(tokenizer, "encode_batch_fast", tokenizer.encode_batch)
        for made in encode(texts, add_special_tokens=False):
            parts += [np.array(made.ids, vocabulary.dtype), end]
    whole = np.concatenate(parts) if parts else end[:0]
    with replacing(path) as file:
        np.save(file, whole)
    return len(whole)


def _batches(texts: Iterator[str]) -> Iterator[list[str]]:
    """Yield texts in lists of about a MB, so that the tokenizer's threads have something to do."""
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size > 2**20:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def token_identity(
    paths: Sequence[str], columns: Sequence[str], vocabulary: Vocabulary, tokens: int
) -> str:
    """Return what changes when a text, the tokenizer, or how rows are cut does."""
    what = [file_checksum(vocabulary.path), vocabulary.end, tokens, *sorted(set(columns))]
    return f"{identity_of(paths)} {' '.join(map(str, what))}"


def _runs(rows: Int64s) -> list[tuple[int, int]]:
    """Return where runs of neighbours, which are read in one go, begin and stop among rows."""
    cuts = (np.flatnonzero(np.diff(rows) != 1) + 1).tolist()
    return [(a, b) for a, b in zip([0, *cuts], [*cuts, len(rows)], strict=True) if a < b]
