"""A thousand damaged files of other makers' layouts: what opening and reading them ends in.

    python benchmarks/fuzz_layouts.py --files 1000

Samples of unequal length, groups, compound tables, texts, encoded images, sparse matrices, packed
variables with calendars, indices and catalogues, and what `data pack` takes: each is made once,
then copies have bytes flipped, are cut, or have other attributes, shapes, types or numbers than
they should. Each copy is read whole, as training does, and shown as `data info` does, in a process
of its own with bounded memory. The exit code is 1 if one crashed, hung, took too much memory, or
failed without an explanation. Values that differ are no failure: nothing here has a checksum.
"""

from __future__ import annotations

import argparse
import faulthandler
import hashlib
import io
import json
import os
import random
import resource
import select
import shutil
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import h5py
import numpy as np
import torch

sys.path[:0] = [str(Path(__file__).parents[1] / "tests"), str(Path(__file__).parent)]

from fuzz import DAMAGES  # noqa: E402
from helpers.loaders import evaluation_loader  # noqa: E402

from hpctrain.config.schema_data import DataSection, FieldTable, SamplesTable  # noqa: E402
from hpctrain.convert.commands import info, stats, verify  # noqa: E402
from hpctrain.convert.parallel import silent  # noqa: E402
from hpctrain.convert.sources.opening import Reading, open_source  # noqa: E402
from hpctrain.data import Writer  # noqa: E402
from hpctrain.data.opening.open_datasets import open_for_training  # noqa: E402
from hpctrain.errors import HpctrainError  # noqa: E402
from hpctrain.launch.communicators import SingleCommunicator  # noqa: E402

OUTCOMES = ("equal", "named", "other values", "unexplained", "no memory", "hung", "crashed")
LIMIT_SECONDS = 120
MEMORY_BYTES = 2 * 2**30
"""Beyond what a process has that has read nothing yet."""
ROWS = 12


class Layout(NamedTuple):
    """One kind of files.

    Attributes:
        make: writes them to a folder.
        name: of the file or folder in it.
        fields: tables of `[data.fields]`; None: it is a source of `data pack`.
        samples: as `[data.samples]` has them.
    """

    make: Callable[[Path], None]
    name: str
    fields: dict[str, dict[str, Any]] | None
    samples: Mapping[str, Any] = MappingProxyType({})


def unequal(folder: Path) -> None:
    draw = np.random.default_rng(0)
    lengths = draw.integers(1, 9, ROWS)
    with h5py.File(folder / "x.h5", "w") as file:
        jets = file.create_dataset("jets", (ROWS,), h5py.vlen_dtype("f4"))
        for row, length in enumerate(lengths):
            jets[row] = draw.random(length, np.float32)
        total = int(lengths.sum())
        file.create_dataset("z", data=draw.random((total, 3)), chunks=(5, 3), compression="gzip")
        file["e"] = np.arange(total, dtype=np.int32)
        file["ptr"] = np.concatenate(([0], np.cumsum(lengths)))
        file["count"] = lengths


def tables(folder: Path) -> None:
    kind = np.dtype([("pt", "<f4"), ("eta", "<f8", (2,)), ("id", "<i4")])
    with h5py.File(folder / "x.h5", "w") as file:
        rows = np.zeros(ROWS, kind)
        rows["pt"] = np.arange(ROWS)
        file.create_dataset("jets", data=rows, chunks=(5,), compression="gzip")
        file["plain"] = rows
        kinds = h5py.enum_dtype({"CAT": 0, "DOG": 7}, "i1")
        file.create_dataset("kind", data=np.where(np.arange(ROWS) % 2, 7, 0), dtype=kinds)
        names = ["cat", "dog", "a longer one"] * (ROWS // 3)
        file.create_dataset("name", data=names, dtype=h5py.string_dtype())
        file["fixed"] = np.array(names, "S12")
        file["z"] = np.arange(ROWS * 2).reshape(ROWS, 2).astype("c8")
        file["turned"] = np.arange(ROWS * 3.0).reshape(3, ROWS)
        file["flag"] = np.arange(ROWS) % 2 == 0


def episodes(folder: Path) -> None:
    draw = np.random.default_rng(1)
    with h5py.File(folder / "x.h5", "w") as file:
        for number in range(4):
            demo = file.create_group(f"data/demo_{number}")
            demo["actions"] = draw.random((5 + number, 7))
            eye = draw.integers(0, 9, (5 + number, 4, 4))
            demo.create_dataset("obs/eye", data=eye, chunks=True)


def encoded(folder: Path) -> None:
    from PIL import Image

    draw = np.random.default_rng(2)
    contents = []
    for number in range(ROWS):
        out = io.BytesIO()
        pixels = draw.integers(0, 255, (20 + number, 24, 3), np.uint8)
        Image.fromarray(pixels).save(out, "JPEG" if number % 2 else "PNG")
        contents.append(np.frombuffer(out.getvalue(), np.uint8))
    with h5py.File(folder / "x.h5", "w") as file:
        image = file.create_dataset("image", (ROWS,), h5py.vlen_dtype("u1"))
        for number, each in enumerate(contents):
            image[number] = each
        file["bytes"] = np.concatenate(contents)
        file["ends"] = np.cumsum([0, *map(len, contents)])
        file["label"] = np.arange(ROWS)


def packed(folder: Path) -> None:
    netcdf: Any = import_module("netCDF4")

    with netcdf.Dataset(folder / "x.nc", "w") as file:
        for name, length in (("time", ROWS), ("level", 3), ("lat", 4)):
            file.createDimension(name, length)
        time = file.createVariable("time", "f8", ("time",))
        time.units, time.calendar = "hours since 2000-01-30", "noleap"
        time[:] = np.arange(ROWS) * 6.0
        file.createVariable("level", "i4", ("level",))[:] = [850, 500, 250]
        file.createVariable("lat", "f4", ("lat",))[:] = np.linspace(90, -90, 4)
        kinds = {"zlib": True, "fill_value": -32768}
        t2m = file.createVariable("t", "i2", ("time", "level", "lat"), **kinds)
        t2m.scale_factor, t2m.add_offset, t2m.units = 0.01, 273.15, "K"
        t2m[:] = 273.15 + np.random.default_rng(3).random((ROWS, 3, 4))
        oro = file.createVariable("oro", "f4", ("lat",))
        oro[:] = np.arange(4)


def cells(folder: Path) -> None:
    anndata: Any = import_module("anndata")
    pandas: Any = import_module("pandas")
    sparse: Any = import_module("scipy.sparse")

    draw = np.random.default_rng(4)
    values = sparse.csr_matrix(draw.poisson(0.5, (ROWS, 9)).astype("f4"))
    kinds = pandas.Categorical(draw.choice(["B", "T"], ROWS))
    names = [f"c{i}" for i in range(ROWS)]
    anndata.AnnData(values, obs=pandas.DataFrame({"kind": kinds}, index=names)).write_h5ad(
        folder / "x.h5ad", compression="gzip"
    )


def genomics(folder: Path) -> None:
    sparse: Any = import_module("scipy.sparse")

    draw = np.random.default_rng(5)
    values = sparse.csc_matrix(draw.poisson(0.5, (9, ROWS)).astype("i4"))
    with h5py.File(folder / "x.h5", "w") as file:
        matrix = file.create_group("matrix")
        for key in ("data", "indices", "indptr"):
            matrix[key] = getattr(values, key)
        matrix["shape"] = np.array(values.shape, "i4")
        matrix["barcodes"] = np.array([f"b{i}" for i in range(ROWS)], "S4")


def indexed(folder: Path) -> None:
    draw = np.random.default_rng(6)
    with Writer(folder / "x", shard_rows=5) as writer:
        writer.extend({"image": draw.random((ROWS, 3)), "label": np.arange(ROWS)})


def listed(folder: Path) -> None:
    from hpctrain.convert.index import make_catalogue

    unequal(folder)
    make_catalogue(str(folder / "x.h5"), folder / "x.json", ["count"], checksums=False)


def columns(folder: Path) -> None:
    pa: Any = import_module("pyarrow")
    pq: Any = import_module("pyarrow.parquet")

    values = pa.FixedSizeListArray.from_arrays(pa.array(np.arange(ROWS * 3.0)), 3)
    table = pa.table({"x": np.arange(ROWS), "v": values})
    pq.write_table(table, folder / "x.parquet", row_group_size=5)


def arrow(folder: Path) -> None:
    pa: Any = import_module("pyarrow")

    table = pa.table({"x": np.arange(ROWS), "v": np.arange(ROWS) / 2})
    with pa.ipc.new_file(f"{folder}/x.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=5)


def store(version: int) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        zarr: Any = import_module("zarr")

        group = zarr.open_group(folder / "x.zarr", mode="w", zarr_format=version)
        group.create_array("image", data=np.arange(ROWS * 6.0).reshape(ROWS, 6), chunks=(5, 6))
        group.create_array("label", data=np.arange(ROWS), chunks=(5,))

    return make


def classic(folder: Path) -> None:
    io: Any = import_module("scipy.io")

    with io.netcdf_file(folder / "x.nc", "w") as file:
        file.createDimension("time", ROWS)
        file.createDimension("x", 4)
        variable = file.createVariable("t", "i2", ("time", "x"))
        variable[:] = np.arange(ROWS * 4).reshape(ROWS, 4)
        variable.scale_factor = 0.5


def archive(folder: Path) -> None:
    np.savez_compressed(folder / "x.npz", x=np.arange(ROWS * 4.0).reshape(ROWS, 4), y=np.ones(ROWS))


def array(folder: Path) -> None:
    np.save(folder / "x.npy", np.arange(ROWS * 4.0).reshape(ROWS, 4))


def idx(folder: Path) -> None:
    content = bytes([0, 0, 8, 2]) + (ROWS).to_bytes(4, "big") + (4).to_bytes(4, "big")
    (folder / "x-idx2-ubyte").write_bytes(content + bytes(range(ROWS * 4)))


def images(folder: Path) -> None:
    from PIL import Image

    (folder / "x").mkdir()
    draw = np.random.default_rng(7)
    for number in range(4):
        pixels = draw.integers(0, 255, (9, 9, 3), np.uint8)
        Image.fromarray(pixels).save(folder / "x" / f"{number}.{'png' if number % 2 else 'jpg'}")


LAYOUTS = {
    "vlen": Layout(unequal, "x.h5", {"jets": {"batch": "pad", "mask": "there"}}),
    "offsets": Layout(
        unequal,
        "x.h5",
        {
            "z": {"offsets": "ptr", "batch": "concat"},
            "e": {"counts": "count", "batch": "concat", "shift_by": "z"},
        },
    ),
    "packed tokens": Layout(
        unequal, "x.h5", {"e": {"offsets": "ptr", "batch": "pack", "max_length": 8, "sample": "d"}}
    ),
    "compound": Layout(
        tables,
        "x.h5",
        {"pt": {"path": "jets/pt"}, "eta": {"path": "plain/eta"}, "id": {"path": "jets/id"}},
    ),
    "enum and texts": Layout(
        tables,
        "x.h5",
        {
            "kind": {"classes": "sorted"},
            "name": {"classes": "sorted"},
            "text": {"path": "name", "dtype": "S12"},
            "fixed": {"dtype": "bytes"},
        },
    ),
    "complex and axes": Layout(
        tables, "x.h5", {"z": {"dtype": "complex64"}, "turned": {"axis": 1}, "flag": {}}
    ),
    "episodes": Layout(
        episodes,
        "x.h5",
        {"a": {"path": "data/demo_*/actions"}, "o": {"path": "data/demo_*/obs/eye", "steps": 2}},
    ),
    "images": Layout(encoded, "x.h5", {"image": {"image": (8, 8)}, "label": {}}),
    "images by offsets": Layout(
        encoded, "x.h5", {"i": {"path": "bytes", "offsets": "ends", "image": (8, 8)}}
    ),
    "netCDF-4": Layout(
        packed,
        "x.nc",
        {
            "t": {"select": {"level": [500]}, "squeeze": True, "fill": 0.0, "mask": "m"},
            "oro": {"static": True},
        },
        {"train": {"time": ["2000-01-31", "2000-02-02"]}},
    ),
    "netCDF-4 weighed": Layout(packed, "x.nc", {"t": {"weight": "cos_latitude", "steps": 2}}),
    "h5ad": Layout(cells, "x.h5ad", {"X": {"sparse": "dense"}, "kind": {"path": "obs/kind/codes"}}),
    "10x": Layout(genomics, "x.h5", {"m": {"path": "matrix", "sparse": "csr"}}),
    "index.json": Layout(indexed, "x", {"image": {}, "label": {}}),
    "catalogue": Layout(listed, "x.json", {"count": {}}),
    "Parquet": Layout(columns, "x.parquet", None),
    "Arrow": Layout(arrow, "x.arrow", None),
    "Zarr 2": Layout(store(2), "x.zarr", None),
    "Zarr 3": Layout(store(3), "x.zarr", None),
    "netCDF-3": Layout(classic, "x.nc", None),
    "npz": Layout(archive, "x.npz", None),
    "npy": Layout(array, "x.npy", None),
    "IDX": Layout(idx, "x-idx2-ubyte", None),
    "image folder": Layout(images, "x", None),
    "HDF5 as a source": Layout(unequal, "x.h5", None),
}


def digest_of(layout: Layout, path: Path) -> str:
    """Return a hash of all that a file delivers."""
    digest = hashlib.sha256()
    if layout.fields is None:
        pattern = str(path) if path.name != "x.h5" else f"{path}:e"
        source = open_source([pattern], Reading())
        for name, read in source.read(np.arange(source.samples)).items():
            each = np.asarray(read)
            digest.update(f"{name} {each.dtype} {each.shape}".encode() + each.tobytes())
        return digest.hexdigest()
    section = DataSection(
        train=str(path),
        global_batch_size=5,
        fields={name: FieldTable(**table) for name, table in layout.fields.items()},
        samples=SamplesTable(**layout.samples),
    )
    static = {name for name, table in layout.fields.items() if table.get("static")}
    names = [name for name in layout.fields if name not in static]
    dataset = open_for_training(section, names)
    loader = evaluation_loader(dataset, fields=names, batch_size=5)
    try:
        for batch in loader:
            for name, tensor in batch.fields.items():
                dense = tensor.to_dense() if tensor.layout != torch.strided else tensor
                digest.update(f"{name} {dense.dtype} {tuple(dense.shape)}".encode())
                digest.update(dense.contiguous().numpy().tobytes())
    finally:
        loader.close()
    return digest.hexdigest()


def shown(layout: Layout, path: Path) -> None:
    """Show a file, and check and measure it, as the tools do."""
    asked = argparse.Namespace(
        dataset=str(path),
        fields=None,
        json=False,
        jobs=1,
        range=[],
        allow_nan=[],
        stored=False,
        out=path.parent / "stats.json",
    )
    for tool in (info, verify, stats) if layout.fields is not None else ():
        with suppress(HpctrainError):
            tool(asked, SingleCommunicator(), silent)


def outcome(layout: Layout, path: Path, right: str) -> tuple[str, str]:
    """Return what reading a copy ends in, and more for whoever looks into it."""
    try:
        found = digest_of(layout, path)
        return ("equal" if found == right else "other values"), found
    except HpctrainError as error:
        return ("named" if str(path) in str(error) else "unexplained"), f"{error}"
    except MemoryError:
        return "no memory", traceback.format_exc()
    except Exception:  # noqa: BLE001 - it is what is looked for
        return "unexplained", traceback.format_exc()
    finally:
        shown(layout, path)


def apart(layout: Layout, path: Path, right: str) -> tuple[str, str]:
    """Return the outcome of a copy in a process of its own, whatever becomes of that.

    A fork, which this process can afford: it has read nothing, so it has no threads.
    """
    reads, writes = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reads)
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(LIMIT_SECONDS)
            faulthandler.dump_traceback_later(LIMIT_SECONDS - 10)
            pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
            limit = pages * os.sysconf("SC_PAGE_SIZE") + MEMORY_BYTES
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            try:
                found = outcome(layout, path, right)
            except MemoryError:
                found = "no memory", traceback.format_exc()
            except BaseException:  # noqa: BLE001 - of a tool
                found = "unexplained", traceback.format_exc()
            os.write(writes, json.dumps((found[0], found[1][-3500:])).encode())
        finally:
            os._exit(0)
    os.close(writes)
    with os.fdopen(reads, "rb") as pipe:
        select.select([pipe], [], [], LIMIT_SECONDS * 2)
        told = pipe.read()
    status = os.waitpid(child, 0)[1]
    if told:
        found = json.loads(told)
        return found[0], found[1]
    number = status & 127
    return ("hung" if number == signal.SIGALRM else "crashed"), f"signal {number}"


STRANGE: list[Any] = [
    *(-1, 0, 1, 2**31, 2**63 - 1, -(2**63), 1e300, float("nan"), float("inf")),
    *(
        "",
        "\0",
        "x" * 5000,
        "days since",
        "days since 0000-00-00",
        "hours since 2000-01-01",
        "none",
    ),
    *([], [1, 2, 3], ["a", "b"], True, b"\xff\xfe"),
]
ATTRIBUTES = (
    *("_FillValue", "missing_value", "scale_factor", "add_offset", "units", "calendar"),
    *(
        "_Unsigned",
        "valid_range",
        "valid_min",
        "encoding-type",
        "shape",
        "categories",
        "_FillValue",
    ),
    *(
        "DIMENSION_LIST",
        "_Netcdf4Dimid",
        "CLASS",
        "NAME",
        "MATLAB_class",
        "coordinates",
        "flag_values",
    ),
)


def other_attribute(file: h5py.File, found: Any, draw: random.Random) -> None:
    """Say something else of an array than it should."""
    target = draw.choice([found, found, file])
    name = draw.choice([*ATTRIBUTES, *target.attrs])
    value = draw.choice(STRANGE)
    target.attrs[name] = value


def other_array(file: h5py.File, found: Any, draw: random.Random) -> None:
    """Put an array of another shape, type or order in the place of one."""
    name, values = found.name, found[()]
    kinds: list[Callable[[], Any]] = [
        lambda: values[: len(values) // 2],
        lambda: values[::-1],
        lambda: np.concatenate([values, values]),
        lambda: np.zeros((0, *values.shape[1:]), "f4"),
        lambda: np.float64(draw.random()),
        lambda: np.full(values.shape, draw.choice([-1, 2**40, 255]), "i8"),
        lambda: np.full(values.shape, draw.choice([np.nan, np.inf, -1.5, 1e300])),
        lambda: np.array([b"text"] * len(values), "S4"),
        lambda: values.reshape(len(values), -1, 1),
        lambda: h5py.Empty("f4"),
        lambda: np.zeros((len(values), 2), [("a", "f4"), ("b", "S3")]),
        lambda: np.random.default_rng(draw.randrange(99)).permutation(values),
    ]
    made = draw.choice(kinds)()
    del file[name]
    if draw.random() < 0.1:
        return
    if draw.random() < 0.1:
        file[name] = h5py.ExternalLink(draw.choice(["/dev/zero", "gone.h5", file.filename]), name)
    elif draw.random() < 0.1:
        file[name] = h5py.SoftLink(draw.choice([name, "/gone"]))
    else:
        file[name] = made


def edited(path: Path, draw: random.Random) -> None:
    """Change a file as a program would that does not know what belongs together."""
    with h5py.File(path, "r+") as file:
        names: list[str] = []
        file.visititems(lambda n, o: names.append(n) if isinstance(o, h5py.Dataset) else None)
        for _ in range(draw.randint(1, 3)):
            if not (there := [name for name in names if _is_array(file, name)]):
                return
            how = draw.choice([other_attribute, other_array])
            with suppress(TypeError, ValueError, IndexError, OSError, KeyError, RuntimeError):
                how(file, file[draw.choice(there)], draw)


def _is_array(file: h5py.File, name: str) -> bool:
    try:
        return isinstance(file.get(name), h5py.Dataset)
    except (OSError, RuntimeError, KeyError):  # a link that an edit has made
        return False


def other_json(path: Path, draw: random.Random) -> None:
    """Put something else in a place of a JSON file."""
    tree = json.loads(path.read_text(encoding="utf-8"))
    if not (places := list(_places(tree))):
        return
    for _ in range(draw.randint(1, 3)):
        inside, key = draw.choice(places)
        value = draw.choice([*STRANGE[:-1], None, {}, [[]], 2**70, "../x", "/dev/zero"])
        with suppress(KeyError, IndexError):
            if draw.random() < 0.2:
                del inside[key]
            else:
                inside[key] = value
    path.write_text(json.dumps(tree), encoding="utf-8")


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    keys = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in list(keys):
        yield tree, key
        if isinstance(value, dict | list):
            yield from _places(value)


def damage(path: Path, draw: random.Random) -> None:
    """Damage one file of a copy, in one of the ways that fit it."""
    files = [path] if path.is_file() else sorted(each for each in path.rglob("*") if each.is_file())
    file = draw.choice(files)
    if (file.suffix == ".json" or file.name.startswith(".z")) and draw.random() < 0.8:
        other_json(file, draw)
    elif h5py.is_hdf5(file) and draw.random() < 0.6:
        edited(file, draw)
    else:
        file.write_bytes(draw.choice(DAMAGES)(bytearray(file.read_bytes()), draw))


def main() -> int:
    """Make, damage, read, and tell."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layout", choices=LAYOUTS, action="append")
    parser.add_argument("--keep", type=Path, help="folder for what did not end as it should")
    parser.add_argument("--json", action="store_true")
    parsed = parser.parse_args()
    chosen = parsed.layout or list(LAYOUTS)
    counts: dict[str, Counter[str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for number, name in enumerate(chosen):
            copies = len(range(number, parsed.files, len(chosen)))
            counts[name] = fuzz(name, Path(folder, str(number)), copies, parsed.seed, parsed.keep)
    if parsed.json:
        sys.stdout.write(f"{json.dumps(counts)}\n")
    else:
        sys.stdout.write(f"{'':20}" + "".join(f"{each:>14}" for each in OUTCOMES) + "\n")
        for row, found in counts.items():
            numbers = "".join(f"{found[each]:>14}" for each in OUTCOMES)
            sys.stdout.write(f"{row:20}{numbers}\n")
    return int(any(found[each] for found in counts.values() for each in OUTCOMES[3:]))


def fuzz(name: str, folder: Path, copies: int, seed: int, keep: Path | None) -> Counter[str]:
    """Return how often each outcome came of copies of one layout."""
    layout = LAYOUTS[name]
    whole = folder / "whole"
    whole.mkdir(parents=True)
    layout.make(whole)
    found: Counter[str] = Counter()
    ended, right = apart(layout, whole / layout.name, "")
    if ended != "other values":
        raise SystemExit(f"{name}: {ended} before any damage: {right}")
    for number in range(copies):
        copy = folder / str(number)
        shutil.copytree(whole, copy)
        draw = random.Random(f"{seed} {name} {number}")
        damage(copy / layout.name, draw)
        ended, more = apart(layout, copy / layout.name, right)
        found[ended] += 1
        if ended in OUTCOMES[3:]:
            sys.stderr.write(f"== {name} {number}: {ended}\n{more}\n")
            if keep is not None:
                shutil.copytree(copy, keep / f"{name.replace(' ', '_')}-{number}")
        shutil.rmtree(copy)
    return found


if __name__ == "__main__":
    sys.exit(main())
