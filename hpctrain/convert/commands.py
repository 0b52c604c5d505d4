"""What the tools of `python -m hpctrain data` do with their options, and say at their end."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpctrain.config.importing import is_reference
from hpctrain.convert import pack as packing
from hpctrain.convert.pack import Packing
from hpctrain.convert.parallel import Progress
from hpctrain.convert.sources.opening import Reading, copied, open_source, to_copy
from hpctrain.convert.sources.remote import Fetched, fetched
from hpctrain.convert.sources.source import Source
from hpctrain.data.files.catalogue import is_catalogue
from hpctrain.data.files.discovery import open_dataset
from hpctrain.data.files.storage import Storage
from hpctrain.errors import DatasetError, UsageError
from hpctrain.topology import Communicator, on_rank_zero
from hpctrain.utils.text import first_lines, plural

if TYPE_CHECKING:
    from hpctrain.convert.info import Look

DIGITS = ["digits"]
MOST_PROBLEMS = 20
"""Told in one message; the number of all of them is told as well."""

HOW_TO_DECODE = (
    'Train with [data.fields] image = {counts = "image_counts", image = [224, 224]}: its rows and '
    "columns"
)

Work = Callable[[argparse.Namespace, Communicator, Progress], str]


def _packing(parsed: argparse.Namespace) -> Packing:
    storage: Storage = parsed.filter
    return Packing(
        splits=parsed.split,
        seed=parsed.seed,
        shuffle=parsed.shuffle,
        shard_bytes=parsed.shard_size,
        shard_rows=parsed.shard_rows,
        storage=Storage(storage.filter, storage.level, parsed.chunk),
    )


def pack(parsed: argparse.Namespace, communicator: Communicator, progress: Progress) -> str:
    """Pack a source. Collective: all ranks."""
    if parsed.source == DIGITS:
        from hpctrain.convert.digits import pack_digits

        if _packing(parsed) != Packing() or _reading(parsed) != Reading():
            raise UsageError(
                "data pack digits: the digits are packed in one way only, without options",
                everywhere=True,
            )
        return on_rank_zero(communicator, lambda: pack_digits(parsed.folder))

    if (reference := _object(parsed.source)) is not None:
        return _pack_object(reference, parsed, communicator, progress)

    if parsed.end_of_text is not None and parsed.tokenizer is None:
        raise UsageError(
            "--end-of-text names a token of --tokenizer: give that too", everywhere=True
        )
    listing = on_rank_zero(communicator, lambda: to_copy(parsed.source))
    if listing is None:
        return _pack_files(parsed, communicator, progress)
    encoded = " encoded" if parsed.encoded else ""
    identity = (
        f"{listing.identity} {_reading(parsed)} {parsed.tokenizer} {parsed.end_of_text}{encoded}"
    )
    there = on_rank_zero(
        communicator, lambda: packing.whole(parsed.folder, _packing(parsed), identity)
    )
    if there is not None:
        return there
    with fetched(listing, parsed.folder, communicator, progress) as patterns:
        here = argparse.Namespace(**{**vars(parsed), "source": copied(parsed.source, patterns)})
        return _pack_files(
            here, communicator, progress, lambda source: Fetched(source, listing.name, identity)
        )


def _pack_files(
    parsed: argparse.Namespace,
    communicator: Communicator,
    progress: Progress,
    called: Callable[[Source], Source] = lambda source: source,
) -> str:
    """Pack files that are here, as a source that `called` may name. Collective: all ranks."""
    if parsed.tokenizer is not None:
        return _pack_tokens(parsed, communicator, progress, called)

    if parsed.encoded and _reading(parsed) != Reading(encoded=True):
        raise UsageError(
            "--encoded keeps files of images as they are, without --axis, --dtype, --size, --grey "
            "and --tokens: sizes and channels are said in the config, [data.fields.image]",
            everywhere=True,
        )

    def source() -> Source:
        return called(open_source(parsed.source, _reading(parsed)))

    told = packing.pack(source, parsed.folder, _packing(parsed), communicator, progress)
    return f"{told}. {HOW_TO_DECODE}" if parsed.encoded else told


def _object(texts: Sequence[str]) -> str | None:
    """Return the import path of a torch Dataset, None where files are packed."""
    name, _, reference = texts[0].partition("=")
    is_one = len(texts) == 1 and name == "dataset" and is_reference(reference)
    return reference if is_one and not Path(texts[0]).exists() else None


def _pack_object(
    reference: str, parsed: argparse.Namespace, communicator: Communicator, progress: Progress
) -> str:
    """Pack a torch Dataset, or a stream of samples, which rank 0 reads. Collective: all ranks."""
    from hpctrain.convert.sources.objects import ObjectSource, is_stream, made, spooled

    if _reading(parsed) != Reading():
        raise UsageError(
            f"data pack dataset={reference}: samples are packed as the Dataset gives them, "
            "without --axis, --dtype, --size, --grey, --encoded and --tokens",
            everywhere=True,
        )
    with ExitStack() as stack:

        def source() -> Source:
            if is_stream(made(reference)):
                return stack.enter_context(spooled(reference, parsed.folder))
            return ObjectSource.of(reference)

        return packing.pack(source, parsed.folder, _packing(parsed), communicator, progress)


def _pack_tokens(
    parsed: argparse.Namespace,
    communicator: Communicator,
    progress: Progress,
    called: Callable[[Source], Source],
) -> str:
    """Pack texts by a tokenizer file. Collective: all ranks."""
    from hpctrain.convert.sources import text
    from hpctrain.convert.sources.opening import text_files

    length = parsed.tokens or text.DEFAULT_TOKENS
    if _reading(parsed) != Reading(tokens=parsed.tokens):
        raise UsageError(
            "--tokenizer: texts are packed as tokens, without --axis, --dtype, --size and --grey",
            everywhere=True,
        )

    def plan() -> tuple[text.Vocabulary, list[tuple[text.Piece, str]], str]:
        vocabulary = text.vocabulary_of(parsed.tokenizer, parsed.end_of_text)
        files = text_files(parsed.source)
        pieces = [
            (piece, column or text.DEFAULT_COLUMN)
            for column, paths in files
            for piece in text.pieces_of(paths)
        ]
        paths = [path for _, paths in files for path in paths]
        columns = [column for _, column in pieces]
        return vocabulary, pieces, text.token_identity(paths, columns, vocabulary, length)

    vocabulary, pieces, identity = on_rank_zero(communicator, plan)
    whole = on_rank_zero(
        communicator, lambda: packing.whole(parsed.folder, _packing(parsed), identity)
    )
    if whole is not None:
        return whole
    with text.tokenized(
        " ".join(parsed.source),
        pieces,
        vocabulary,
        length,
        identity=identity,
        beside=parsed.folder,
        communicator=communicator,
        progress=progress,
    ) as source:
        return packing.pack(
            lambda: called(source), parsed.folder, _packing(parsed), communicator, progress
        )


def again(parsed: argparse.Namespace, communicator: Communicator, progress: Progress) -> str:
    """Write a dataset anew, in parts or stored otherwise. Collective: all ranks."""
    from hpctrain.convert.sources.indexed import Indexed

    return packing.pack(
        lambda: Indexed.open(parsed.source),
        parsed.folder,
        _packing(parsed),
        communicator,
        progress,
    )


def _reading(parsed: argparse.Namespace) -> Reading:
    return Reading(
        axes=dict(parsed.axis),
        dtypes=dict(parsed.dtype),
        size=parsed.size,
        grey=parsed.grey,
        tokens=parsed.tokens,
        encoded=parsed.encoded,
    )


def info(parsed: argparse.Namespace, _: Communicator, __: Progress) -> str:
    """Tell what a dataset holds, or what there is where it is none as it stands."""
    from hpctrain.convert.info import parts_of

    parts = parts_of(parsed.dataset)
    if not parts:
        told = _told(parsed.dataset, parsed.fields, as_json=parsed.json)[0]
        return told if isinstance(told, str) else json.dumps(told, indent=1)
    return _told_of_splits(parsed, parts)


def _told_of_splits(parsed: argparse.Namespace, parts: Sequence[str]) -> str:
    """Tell what the folders of a folder hold, and how to train on them together."""
    from hpctrain.convert.info import look
    from hpctrain.convert.splits import for_training, joint, joint_facts, joint_text

    train = for_training(parts) if parsed.fields is None else None
    found = {
        part: _told(part, parsed.fields, as_json=parsed.json, is_part=train is not None)
        for part in parts
    }
    told = {part: said for part, (said, _) in found.items()}
    about = None
    if train is not None:
        looks = {part: seen or look(part, None) for part, (_, seen) in found.items()}
        about = joint(looks, train)
    if parsed.json:
        together = {} if about is None else {"joint": joint_facts(about)}
        return json.dumps({"source": parsed.dataset, "parts": told} | together, indent=1)
    together_text = [] if about is None else [f"{parsed.dataset}: {joint_text(about)}"]
    return "\n\n".join([*map(str, told.values()), *together_text])


def _told(
    pattern: str, fields: Sequence[str] | None, *, as_json: bool, is_part: bool = False
) -> tuple[str | dict[str, Any], Look | None]:
    """Return what a dataset holds, and what a look into its files has found, if there was one."""
    from hpctrain.convert.info import (
        describe,
        description,
        holds_more,
        is_made,
        look,
        look_facts,
        look_text,
        more_text,
    )

    facts, problem = None, None
    try:
        facts = describe(open_dataset(pattern, fields))
    except DatasetError as error:
        if fields is not None or (is_made(pattern) and not is_catalogue(Path(pattern))):
            raise
        problem = error
    if facts is not None and fields is not None:
        return (facts if as_json else description(facts)), None
    if facts is not None and is_made(pattern):
        if not holds_more(pattern, facts["fields"]):
            return (facts if as_json else description(facts)), None
        about = look(pattern, None)
        if as_json:
            return {**facts, "sets": look_facts(about)["sets"]}, about
        more = [] if is_part else [more_text(about, facts["fields"])]
        return "\n".join([description(facts), *filter(None, more)]), about
    about = look(pattern, problem)
    if as_json:
        return {**look_facts(about), **(facts or {})}, about
    text = look_text(about, with_config=not is_part)
    return "\n".join([*([description(facts, with_fields=False)] if facts else []), text]), about


def index(parsed: argparse.Namespace, _: Communicator, progress: Progress) -> str:
    """Make an index."""
    from hpctrain.convert.index import make_catalogue, make_index

    if parsed.out is not None:
        files = make_catalogue(
            parsed.dataset,
            parsed.out,
            parsed.fields,
            checksums=not parsed.no_checksums,
            jobs=parsed.jobs,
            progress=progress,
        )
        return f'{parsed.out}: lists {plural(len(files), "file")}; train = "{parsed.out}"'
    if parsed.no_checksums:
        raise UsageError("--no-checksums goes with --out: an index.json has checksums")
    made = make_index(parsed.dataset, parsed.fields, jobs=parsed.jobs, progress=progress)
    found = f"{plural(made.samples, 'sample')} in {plural(len(made.shards), 'shard')}"
    return f"{made.source}: indexed {found}"


def verify(parsed: argparse.Namespace, _: Communicator, progress: Progress) -> str:
    """Look for all damage.

    Raises:
        DatasetError: if there is any.
    """
    from hpctrain.convert.verify import verify

    verdict = verify(
        parsed.dataset,
        parsed.fields,
        limits=dict(parsed.range),
        nan_allowed=parsed.allow_nan,
        as_stored=parsed.stored,
        jobs=parsed.jobs,
        progress=progress,
    )
    if verdict.problems:
        raise DatasetError(
            *_problems(verdict.source, verdict.problems),
            *([verdict.not_looked_at] if verdict.not_looked_at else []),
        )
    compared = "" if verdict.has_checksums else " (there are no checksums to compare with)"
    return (
        f"{verdict.source}: {plural(verdict.samples, 'sample')} in "
        f"{plural(verdict.shards, 'shard')}, {plural(verdict.size, 'byte')}, all as they should "
        f"be{compared}" + _further(verdict.not_looked_at)
    )


def _further(not_looked_at: str) -> str:
    return f"\n{not_looked_at}" if not_looked_at else ""


def _problems(source: str, problems: Sequence[str]) -> list[str]:
    told = first_lines(problems, MOST_PROBLEMS, "  ")
    return [f"{source}: {plural(len(problems), 'problem')}", *told]


def stats(parsed: argparse.Namespace, _: Communicator, progress: Progress) -> str:
    """Measure values and write them down."""
    from hpctrain.convert.stats import measure, summary
    from hpctrain.convert.unseen import not_looked_at_in
    from hpctrain.data.stats import STATS_NAME, write_stats

    dataset = open_dataset(parsed.dataset, parsed.fields)
    if parsed.stored:
        dataset = dataset.as_stored(dataset.fields)
    path = parsed.out or Path(dataset.shards[0].path).parent / STATS_NAME
    stats = measure(dataset, parsed.jobs, progress)
    write_stats(stats, path)
    complex_ = [name for name in dataset.fields if name not in stats["fields"]]
    rest = not_looked_at_in(dataset, parsed.dataset, [f"{name} (complex)" for name in complex_])
    return f"{summary(stats)}\nwritten to {path}{_further(rest)}"


def bench(parsed: argparse.Namespace, _: Communicator, progress: Progress) -> str:
    """Measure speed."""
    import dataclasses

    from hpctrain.convert.bench import bench
    from hpctrain.convert.unseen import not_looked_at_in
    from hpctrain.data.reading.threads import reading_threads

    dataset = open_dataset(parsed.dataset, parsed.fields)
    rest = not_looked_at_in(dataset, parsed.dataset)
    speed = bench(
        dataset,
        global_batch_size=parsed.batch,
        seconds=parsed.seconds,
        cold=parsed.cold,
        buffer_mb=parsed.buffer_mb,
        threads=reading_threads(1),
        progress=progress,
    )
    if parsed.json:
        return json.dumps(
            {**dataclasses.asdict(speed), "ratio": speed.ratio, "not_looked_at": rest}
        )
    return f"{parsed.dataset}: {speed}{_further(rest)}"
