"""The config's `[data]`: files, fields, samples, sources, and how they are cut into batches.

Plain data, a part of `hpctrain.config.schema`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Interval

from hpctrain.config.value_types import Count, CountOrNever, Reference, Text


@dataclass(frozen=True, slots=True, kw_only=True)
class FieldTable:
    """Where the values of one field are, and how many rows of them make a sample."""

    path: Text | None = None
    """HDF5 dataset in every file, such as "/group/temperature", or one in each of many groups of
    it, "data/demo_*/actions"; none: named as the field is."""

    attribute: Text | None = None
    """Attribute of each group that the samples are in, or of each file, in place of an HDF5
    dataset; `path` names other groups or HDF5 datasets that have it. "/" is the file."""

    axis: Annotated[int, Ge(0)] | Literal["none"] = 0
    """Axis of that HDF5 dataset that counts its rows, from 0; "none": all of it is one row, of its
    group or file."""

    train: Text | None = None
    """Files that hold it, joined row by row with the other fields; none: those of `data.train`."""

    validation: Text | None = None
    """The same, for evaluation; none: those of `data.validation`."""

    dtype: Text | None = None
    """Number format to deliver, such as "float32"; "bytes", or "S20": 20 bytes of each text."""

    squeeze: bool = False
    """Leave axes of length 1 of a sample out."""

    select: dict[str, Any] = field(default_factory=dict)
    """What is taken of a sample's axes: {level = [500, 850]} by values of a coordinate, {0 = "2:5"}
    or {0 = [1, 3]} by axis and indices."""

    nearest: bool = False
    """Select what is nearest to a value of a coordinate, not only what is equal."""

    classes: Literal["sorted"] | tuple[Text, ...] | None = None
    """Texts or names of an enumeration that become 0, 1, 2 and so on; "sorted": those there are."""

    missing: int | None = None
    """Number of what is none of the classes, or empty, or NaN where `dtype` is of whole numbers:
    what a mask marks, or `task.ignore_index`; none: such a row is refused."""

    steps: Count | None = None
    """Rows that one sample holds, along a first axis of their own; none: one, without that axis."""

    lead: CountOrNever = 0
    """Rows from the sample's own row t to the first of these, such as a lead time."""

    every: Count = 1
    """Rows from one of them to the next."""

    decode: Literal["cf", "integers", "none"] | None = None
    """As `data.decode`, for this field; "integers": only mark what is missing among them."""

    fill: float | None = None
    """Number in place of missing values, once normalised; none: NaN, of integers what is stored."""

    mask: Text | None = None
    """Name of a further field: 1 where this one has a value, 0 where it is missing, or padded."""

    static: bool = False
    """One array for all samples, without an axis of them, such as orography: read once, and the
    same in every file."""

    weight: Literal["cos_latitude", "cell_area"] | None = None
    """Make a further field NAME.weight: how much the values at each latitude count, 1 on average.
    By it built-in tasks weigh the loss and the metrics of their target."""

    offsets: Text | None = None
    """HDF5 dataset that says where in this one the values of each sample begin, such as "ptr"."""

    counts: Text | None = None
    """HDF5 dataset that says how many of this one's values each sample has."""

    batch: Literal["pad", "concat", "pack"] | None = None
    """How samples of unequal length make a batch: padded to the longest of a pass; one after the
    other, with NAME.offsets; or, of tokens, cut into samples of `max_length`."""

    max_length: Count | None = None
    """Values that are kept of a sample, the first ones; none: all."""

    pad: float | None = None
    """Number behind the values of a padded sample; none: 0."""

    sample: Text | None = None
    """Name of a further field: of each value which sample of the pass it is of, or of packed
    tokens, which document of the sample."""

    position: Text | None = None
    """Name of a further field: of each packed token its place in its document, from 0."""

    shift_by: Text | None = None
    """Field whose values these are indices of; in a batch they count those of the whole pass."""

    sparse: Literal["dense", "csr"] | None = None
    """The path is a sparse matrix of AnnData or 10x Genomics (a group of data, indices, indptr),
    whose rows are delivered as such a tensor; none: it is none."""

    image: tuple[Count, Count] | None = None
    """Rows and columns of pixels that encoded images (JPEG, PNG) become; none: they are none."""

    crop: Literal["center", "random", "none"] = "center"
    """What is kept of an image: the middle; in training a part drawn for each sample; or all."""

    grey: bool = False
    """Images in one channel in place of three."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplesTable:
    """Which rows of the files are samples."""

    train: Text | tuple[int, int] | dict[str, Any] | None = None
    """A boolean HDF5 dataset that says so; the first row and one past the last; or the first and
    the last value of a coordinate, {time = ["1979", "2015-12-31"]}, both included; none: all."""

    validation: Text | tuple[int, int] | dict[str, Any] | None = None
    """The same, for evaluation, of the files of `data.train` where no others are given."""

    test: Text | tuple[int, int] | dict[str, Any] | None = None
    """The same, for `python -m hpctrain test`."""

    validation_fraction: Annotated[float, Interval(gt=0, lt=1)] | None = None
    """Evaluate with about this part of the rows, drawn at random, and train with the others."""

    split_seed: Annotated[int, Interval(ge=0, le=2**63 - 1)] = 0
    """Seeds that draw; another one gives another split."""

    split_by: Literal["rows", "files"] = "rows"
    """Draw pieces of consecutive rows, or whole files."""

    piece_rows: Count | None = None
    """Consecutive rows that stay in one part of the split; none: chosen by the size of the data."""

    stride: Count = 1
    """Rows from one sample's own row t to that of the next."""

    across_files: bool = False
    """Let the rows of one sample begin in one file and end in the next."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceTable:
    """One of several datasets to train with at once, `[[data.sources]]`."""

    name: Text
    """What messages and metrics call it; its order depends on it, and so does going on with it."""

    train: Text
    """As `data.train`, of this source: a folder of shards, a pattern of HDF5 files, or a list."""

    weight: Annotated[float, Ge(0)] | None = None
    """Its part of every batch, in proportion to the others'; none, of all: by their samples."""

    when_exhausted: Literal["repeat", "drop"] = "repeat"
    """Once all of it was served: begin its next epoch, or leave the others its part."""

    samples: Text | tuple[int, int] | dict[str, Any] | None = None
    """As `data.samples.train`, of this source; none: as that says."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSection:
    """Where the samples are and how they are cut into batches."""

    use: Reference | None = None
    """Import path of a LightningDataModule, which makes what the next keys name; none: they do."""

    arguments: dict[str, Any] = field(default_factory=dict)
    """Its keyword arguments: further keys of the table, and those of its `arguments` table."""

    train: str = ""
    """A folder of shards, a pattern of HDF5 files such as "/scratch/me/*.h5", or the import path
    "package.module:Name" of what makes a torch Dataset or DataLoader."""

    train_arguments: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of what is at that import path."""

    sources: tuple[SourceTable, ...] = ()
    """In place of `train`: several datasets, mixed by weight in every batch."""

    validation: Text | None = None
    """The same, for evaluation; none: no evaluation."""

    validation_arguments: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of what is at that import path."""

    test: Text | None = None
    """The same, for `python -m hpctrain test`; training does not look at it."""

    evaluations: dict[str, Text] = field(default_factory=dict)
    """Further data to evaluate with, by name: their metrics are called NAME/loss, and so on.

    Import paths, where `train` is one.
    """

    file_order: Literal["natural", "name"] | None = None
    """Order of files that are found: 2 before 10, or by name; none: "natural" in a new run."""

    decode: Literal["cf", "none"] | None = None
    """Read packed and missing values by the CF conventions, or as stored; none: "cf" in a new run.

    Of these two, none means in a run that has begun: as it began, `hpctrain.config.semantics`.
    """

    global_batch_size: Count = 0
    """Samples of all ranks in one step; left out, 0: as many as a DataLoader says."""

    micro_batch_size: Count | None = None
    """At most so many samples per rank and forward pass; none: a rank's whole share."""

    max_tokens: Count | None = None
    """At most so many values of each field of unequal length per rank and forward pass, those that
    are padded included; none: any number."""

    lanes: Count | None = None
    """Runs of samples that are read side by side; the most ranks that can train."""

    window: Annotated[int, Interval(ge=1, le=1024)] = 4
    """Blocks of a lane that are shuffled together."""

    shuffle: bool = True
    """Another order of the samples in every epoch; false: that of the dataset's rows, in all."""

    weights: Text | None = None
    """Draw samples by weight, with replacement: an HDF5 dataset, "files.h5:name", or a .npy."""

    epoch_samples: Count | None = None
    """Samples of an epoch that are drawn by weight, or mixed; none: as many as there are."""

    drop_last: bool = False
    """Drop the last, smaller batch of an epoch."""

    buffer_mb: Annotated[float, Gt(0)] = 512.0
    """Memory for reading ahead, in MB per rank."""

    read_retries: CountOrNever = 3
    """Try so many times more what cannot be read, after longer and longer waits."""

    verify: Literal["never", "start"] = "never"
    """At the start, verify every shard against its checksum; the ranks share the reading."""

    fields: dict[str, FieldTable] = field(default_factory=dict)
    """Where the fields of the task are, if not in `train` under their own names."""

    samples: SamplesTable = field(default_factory=SamplesTable)
    """Which rows are samples, if not all."""

    stage: Literal["none", "node-local"] = "none"
    """Copy the shards to the disk of every node, beside the training, and read them from there."""

    stage_directory: Text | None = None
    """Directory for that, in which $NAMES are replaced; none: the job's own, as sites have it."""
    normalize: dict[str, Any] = field(default_factory=dict)
    """Fields that become (value - mean) / std on the device; see `hpctrain.config.fields`."""

    sample_transform: Text | None = None
    """Import path of what is done to every sample on the host, before `normalize`."""

    sample_transform_arguments: dict[str, Any] = field(default_factory=dict)
    """Its keyword arguments."""

    workers: Annotated[int, Interval(ge=0, le=1024)] = 1
    """How many of each rank run `sample_transform`, or read a torch Dataset, beside the training.

    Those of a Dataset are processes, and 0 has the rank read it itself; a DataLoader says it.
    """

    workers_are: Literal["threads", "processes"] = "threads"
    """Threads of the rank, or processes, for transforms that hold Python's lock."""

    seed_samples: bool = True
    """Seed the generators that a torch Dataset draws from for each sample: at any world size,
    and after a restart, the same augmentations."""

    transform: Text | None = None
    """Import path of what is done to every batch on the device, after `normalize`."""

    transform_arguments: dict[str, Any] = field(default_factory=dict)
    """Its keyword arguments."""

    cache: Literal["none", "memory"] = "none"
    """Hold the training data in the memory of every node, shuffled row by row, from the start."""

    threads: Count | None = None
    """Threads per rank that read and decompress; none: the rank's share of the cores, at most 4."""
