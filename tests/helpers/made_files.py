"""HDF5 and netCDF-4 files as other people's tools write them, small, each by the tool itself.

`MAKERS` has what makes each of them, by the tool and what is special about the file. Those of tools
that bring filters of their own are made in another process, `make_all` says so.
"""

from __future__ import annotations

import io
import subprocess
import sys
import warnings
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from h5py import h5d, h5p, h5s, h5t

ROWS = 12
Maker = Callable[[Path], None]
MAKERS: dict[str, Maker] = {}
APART = ("pytables", "pandas")
"""Tools whose filters would take the place of h5py's in this process."""


def maker(function: Maker) -> Maker:
    """Register what makes a file, under "tool: what"."""
    tool, _, what = function.__name__.partition("__")
    MAKERS[f"{tool}: {what.replace('_', ' ')}"] = function
    return function


def make_all(folder: Path) -> dict[str, Path]:
    """Make all files in a folder, and return them by what they are."""
    subprocess.run([sys.executable, __file__, str(folder)], check=True, cwd=Path(__file__).parent)
    for name, make in MAKERS.items():
        if not name.startswith(APART):
            _quietly(make, path_of(folder, name))
    return {name: path_of(folder, name) for name in MAKERS}


def path_of(folder: Path, name: str) -> Path:
    """Return where a file is made."""
    suffix = ".nc" if name.startswith(("netcdf4", "xarray")) else ".h5"
    return folder / f"{name.replace(': ', '-').replace(' ', '-')}{suffix}"


def _quietly(make: Maker, path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # each tool warns of what it likes
        make(path)


def numbers(*shape: int, dtype: str = "f4") -> Any:
    """Return numbers that differ."""
    return (np.arange(np.prod(shape)) % 97).reshape(shape).astype(dtype)


# h5py: types


@maker
def h5py__every_class_of_types(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file["number"] = numbers(ROWS, 3, dtype=">f4")
        file["half"], file["whole"] = numbers(ROWS, 2, dtype="f2"), numbers(ROWS, dtype=">u8")
        file["complex"] = np.zeros(ROWS, "c8")
        file["text"] = np.array(["cat", "dog"] * (ROWS // 2), dtype=object)
        file["letters"] = np.array([b"abc", b"de"] * (ROWS // 2))
        file["record"] = np.zeros(
            ROWS, [("pt", "f4"), ("hits", "i4", (2, 3)), ("in", [("x", "u1")])]
        )
        file.create_dataset("jets", (ROWS,), h5py.vlen_dtype("f4"))
        file.create_dataset("kind", (ROWS,), h5py.enum_dtype({"A": 1, "B": 2}, basetype="i2"))
        file["opaque"] = np.zeros(ROWS, "V7")
        file["date"] = np.zeros(ROWS, "M8[s]").astype(h5py.opaque_dtype("M8[s]"))
        file.create_dataset("object", (ROWS,), h5py.ref_dtype)
        file.create_dataset("region", (ROWS,), h5py.regionref_dtype)
        file.create_dataset("array", (ROWS,), "(2,3)f4")
        file.create_dataset("long", (ROWS,), "g")
        rows = h5s.create_simple((ROWS,))
        h5d.create(file.id, b"bits", h5t.STD_B16LE, rows)
        h5d.create(file.id, b"time", h5t.UNIX_D32LE, rows)


@maker
def h5py__types_of_odd_widths(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file["x"] = numbers(ROWS, 2)
        rows = h5s.create_simple((ROWS,))
        for name, kind in (("bits", h5t.STD_B32LE), ("whole", h5t.STD_I32BE)):
            odd = kind.copy()
            odd.set_size(3)
            h5d.create(file.id, name.encode(), odd, rows)
        narrow = h5t.STD_I32LE.copy()
        narrow.set_precision(20)
        h5d.create(file.id, b"narrow", narrow, rows)
        wide = h5t.IEEE_F64LE.copy()
        h5d.create(file.id, b"wide", wide, rows)


@maker
def h5py__bool_and_bitfields(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file["flag"] = numbers(ROWS, dtype="i4") % 2 == 0
        rows = h5s.create_simple((ROWS,))
        for bits in (8, 16, 32, 64):
            kind = getattr(h5t, f"STD_B{bits}{'LE' if bits < 64 else 'BE'}")
            h5d.create(file.id, b"bits%d" % bits, kind, rows)


@maker
def h5py__compound_tables(path: Path) -> None:
    table = np.zeros(
        ROWS,
        [("pt", ">f4"), ("label", "S5"), ("xyz", "f8", (3,)), ("in", [("a", "i2"), ("b", "u1")])],
    )
    table["label"] = [b"left", b"right"] * (ROWS // 2)
    with h5py.File(path, "w") as file:
        file.create_dataset("jets", data=table, chunks=(5,), compression="gzip")
        named = np.dtype([("word", h5py.string_dtype()), ("mass", "f4")])
        file["events"] = np.array([("a", 1.0), ("b", 2.0)] * (ROWS // 2), named)


@maker
def h5py__arrays_as_types(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file.create_dataset("matrix", (ROWS,), "(3,4)f4")[:] = numbers(ROWS, 3, 4)
        file.create_dataset("chunked", (ROWS,), "(2,)i2", chunks=(4,), compression="gzip")
        file["label"] = numbers(ROWS, dtype="i8")


@maker
def h5py__references_only(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file.create_group("a")
        file["refs"] = np.array([file["a"].ref] * 3, h5py.ref_dtype)


@maker
def h5py__sequences(path: Path) -> None:
    with h5py.File(path, "w") as file:
        tokens = file.create_dataset("tokens", (ROWS,), h5py.vlen_dtype("i4"))
        for row in range(ROWS):
            tokens[row] = np.arange(row % 4 + 1)
        file["label"] = numbers(ROWS, dtype="i8")


@maker
def h5py__images_as_sequences(path: Path) -> None:
    with h5py.File(path, "w") as file:
        images = file.create_dataset("images", (ROWS,), h5py.vlen_dtype("u1"))
        for row in range(ROWS):
            images[row] = encoded(8 + row)
        file["action"] = numbers(ROWS, 7)


@maker
def h5py__images_by_offsets(path: Path) -> None:
    images = [encoded(8 + row) for row in range(ROWS)]
    with h5py.File(path, "w") as file:
        file["image"] = np.concatenate(images)
        file["image_offsets"] = np.cumsum([0, *map(len, images)])
        file["label"] = numbers(ROWS, dtype="i8")


def encoded(size: int) -> Any:
    """Return the bytes of a JPEG."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(numbers(size, size, 3, dtype="u1")).save(file, "JPEG")
    return np.frombuffer(file.getvalue(), "u1")


@maker
def h5py__graphs_by_offsets_and_counts(path: Path) -> None:
    atoms, edges = np.arange(ROWS) % 3 + 2, np.arange(ROWS) % 2 + 1
    with h5py.File(path, "w") as file:
        file["pos"] = numbers(atoms.sum(), 3)
        file["atom_ptr"] = np.cumsum([0, *atoms])
        file["edge"] = np.zeros((edges.sum(), 2), "i8")
        file["num_edges"] = edges
        file["energy"] = numbers(ROWS)


@maker
def h5py__starts_without_an_end(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file["tokens"] = numbers(50, dtype="u2")
        file["tokens_start"] = np.arange(0, 50, 10)


# h5py: storage, links and names


@maker
def h5py__links_of_all_kinds(path: Path) -> None:
    other = path.with_suffix(".other")
    with h5py.File(other, "w") as file:
        file["x"] = numbers(ROWS, 2)
    with h5py.File(path, "w") as file:
        file["a/x"] = numbers(ROWS, 4)
        file["hard"] = file["a/x"]
        file["soft"], file["dangling"] = h5py.SoftLink("/a/x"), h5py.SoftLink("/gone")
        file["external"] = h5py.ExternalLink(other.name, "/x")
        file["lost"] = h5py.ExternalLink("gone.h5", "/x")
        file["a/circle"] = h5py.SoftLink("/a")
        # A kind of link of somebody's own, as H5Lregister has them.
        file["type"] = np.dtype("f4")


@maker
def h5py__virtual_and_external(path: Path) -> None:
    source = path.with_suffix(".source")
    with h5py.File(source, "w") as file:
        file["x"] = numbers(ROWS, 3)
    layout = h5py.VirtualLayout((2 * ROWS, 3), "f4")
    layout[:ROWS] = layout[ROWS:] = h5py.VirtualSource(source.name, "x", (ROWS, 3))
    raw = path.with_suffix(".raw")
    raw.write_bytes(numbers(2 * ROWS, 2, dtype="<i4").tobytes())
    with h5py.File(path, "w") as file:
        file.create_virtual_dataset("virtual", layout)
        file.create_dataset(
            "raw", (2 * ROWS, 2), "<i4", external=[(str(raw), 0, h5py.h5f.UNLIMITED)]
        )


@maker
def h5py__a_virtual_without_its_source(path: Path) -> None:
    layout = h5py.VirtualLayout((ROWS, 3), "f4")
    layout[:] = h5py.VirtualSource("gone.h5", "x", (ROWS, 3))
    with h5py.File(path, "w") as file:
        file.create_virtual_dataset("virtual", layout)
        file["x"] = numbers(ROWS, 2)


@maker
def h5py__scalars_empties_and_no_rows(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file["one"], file["word"], file["null"] = 3.0, "text", h5py.Empty("f4")
        file["none"], file["thin"] = np.zeros((0, 3)), np.zeros((ROWS, 0))
        file["x"] = numbers(ROWS)


@maker
def h5py__nothing_at_all(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file.attrs["about"] = "nothing"


@maker
def h5py__groups_without_arrays(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file["a/b/c/one"] = 1


@maker
def h5py__names_of_all_kinds(path: Path) -> None:
    with h5py.File(path, "w") as file:
        for name in ("esc\x1b[31m", "温度", "with space", 'quote"d', "a.b", "x*", "new\nline", "-"):
            file[name] = numbers(ROWS, 2)
        h5d.create(file.id, b"caf\xe9", h5t.IEEE_F32LE, h5s.create_simple((ROWS,)))


@maker
def h5py__attributes_of_all_kinds(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file["x"] = numbers(ROWS, 2)
        about = file["x"].attrs
        about["units"] = np.bytes_(b"m s-1")
        about["empty"], about["reference"] = h5py.Empty("f4"), file["x"].ref
        about["table"] = np.zeros(2, [("a", "f4"), ("b", "S3")])
        about["scale_factor"], about["add_offset"] = "two", np.arange(3)
        about.create("calendar", np.array(["standard"], object), dtype=h5py.string_dtype())


@maker
def h5py__a_newest_file_that_grows(path: Path) -> None:
    with h5py.File(path, "w", libver="latest") as file:
        grown = file.create_dataset("x", (0, 3), "f4", maxshape=(None, 3), chunks=(4, 3))
        file.swmr_mode = True
        for row in range(ROWS):
            grown.resize(row + 1, 0)
            grown[row] = row
        grown.flush()


@maker
def h5py__compact_and_never_written(path: Path) -> None:
    compact = h5p.create(h5p.DATASET_CREATE)
    compact.set_layout(h5d.COMPACT)
    with h5py.File(path, "w") as file:
        made = h5d.create(file.id, b"compact", h5t.STD_U16BE, h5s.create_simple((ROWS, 2)), compact)
        h5py.Dataset(made)[:] = numbers(ROWS, 2, dtype=">u2")
        file.create_dataset("fill", (ROWS, 3), ">f4", fillvalue=2.5)


@maker
def h5py__a_sample_an_array(path: Path) -> None:
    with h5py.File(path, "w") as file:
        for number in range(64):
            file[f"patch_{number:03}"] = numbers(8, 8, dtype="u1")


@maker
def h5py__events_in_groups_of_their_own_shape(path: Path) -> None:
    with h5py.File(path, "w") as file:
        for number in range(5):
            file[f"run{number}/image"] = numbers(3, 8 + number, 8)
            file[f"run{number}/label"] = number


# Layouts that programs of these fields write by h5py


@maker
def robomimic__demonstrations(path: Path) -> None:
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["env_args"] = '{"env_name": "Lift"}'
        for number in range(11):
            length = number % 4 + 3
            demo = data.create_group(f"demo_{number}")
            demo.attrs["num_samples"] = length
            demo["actions"] = numbers(length, 7, dtype="f8")
            demo["obs/agentview_image"] = numbers(length, 8, 8, 3, dtype="u1")
            demo["obs/robot0_eef_pos"] = numbers(length, 3)
            demo["rewards"], demo["dones"] = numbers(length), numbers(length, dtype="i8")
        file["mask/train"] = np.array([b"demo_0", b"demo_1"])


@maker
def aloha__an_episode(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file.attrs["sim"] = True
        file["action"] = numbers(ROWS, 14)
        file["observations/qpos"] = numbers(ROWS, 14)
        file["observations/images/top"] = numbers(ROWS, 8, 10, 3, dtype="u1")


@maker
def keras__weights(path: Path) -> None:
    with h5py.File(path, "w") as file:
        for number, shape in enumerate([(3, 3, 1, 4), (16, 8), (8,)]):
            file[f"layers/dense_{number}/vars/0"] = numbers(*shape)
            file[f"layers/dense_{number}/vars/1"] = numbers(shape[-1])
        file.attrs["keras_version"] = "3.0"


@maker
def deepdish__a_dictionary(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file.attrs["DEEPDISH_IO_VERSION"] = 12
        file.create_dataset("data/x", data=numbers(ROWS, 5), compression="gzip", shuffle=True)
        file["data/y"] = numbers(ROWS, dtype="i8")
        file["data"].attrs["name"] = "mine"


@maker
def cell_ranger__a_sparse_matrix(path: Path) -> None:
    """As 10x Genomics writes it: columns are cells."""
    with h5py.File(path, "w") as file:
        matrix = file.create_group("matrix")
        matrix["data"], matrix["indices"] = numbers(30, dtype="i4"), numbers(30, dtype="i8") % 5
        matrix["indptr"] = np.minimum(np.arange(ROWS + 1) * 3, 30)
        matrix["shape"] = np.array([5, ROWS], "i4")
        matrix["barcodes"] = np.array([b"AAAC-%d" % i for i in range(ROWS)])
        matrix["features/id"] = np.array([b"gene%d" % i for i in range(5)])


@maker
def wrf__letters_of_times(path: Path) -> None:
    """As the model writes it: times as letters, staggered grids."""
    import netCDF4

    with netCDF4.Dataset(path, "w") as file:
        sizes = {
            "Time": None,
            "DateStrLen": 19,
            "south_north": 4,
            "west_east": 5,
            "west_east_stag": 6,
        }
        for name, size in sizes.items():
            file.createDimension(name, size)
        times = [f"2020-01-01_{hour:02}:00:00" for hour in range(ROWS)]
        letters = file.createVariable("Times", "S1", ("Time", "DateStrLen"))
        letters[:] = np.array([list(each) for each in times], "S1")
        file.createVariable("T2", "f4", ("Time", "south_north", "west_east"))[:] = numbers(
            ROWS, 4, 5
        )
        file.createVariable("U", "f4", ("Time", "south_north", "west_east_stag"))[:] = 1
        file.createVariable("XLAT", "f4", ("Time", "south_north", "west_east"))[:] = 45


# MATLAB


@maker
def matlab__version_7_3(path: Path) -> None:
    """As MATLAB lays it out: a user block, axes reversed, cells are references, letters numbers."""
    with h5py.File(path, "w", userblock_size=512) as file:
        for name, values, kind in (
            ("X", numbers(8, ROWS), "double"),
            ("y", numbers(1, ROWS), "double"),
            ("title", np.array([[72], [105]], "u2"), "char"),
            ("flag", np.ones((1, 1), "u1"), "logical"),
        ):
            file[name] = values
            file[name].attrs["MATLAB_class"] = np.bytes_(kind)
        pair = np.zeros((1, ROWS), [("real", "f8"), ("imag", "f8")])
        file["z"] = pair
        file["z"].attrs["MATLAB_class"] = np.bytes_("double")
        cell = file.create_dataset("#refs#/a", data=np.array([[65]], "u2"))
        file["names"] = np.array([[cell.ref]], h5py.ref_dtype)
        file["names"].attrs["MATLAB_class"] = np.bytes_("cell")
        file["empty"] = np.array([0, 0], "u8")
        file["empty"].attrs["MATLAB_empty"] = np.uint8(1)
    with path.open("r+b") as raw:
        raw.write(b"MATLAB 7.3 MAT-file")


@maker
def hdf5storage__a_mat_file(path: Path) -> None:
    import hdf5storage

    values = {
        "X": numbers(ROWS, 4, dtype="f8"),
        "y": numbers(ROWS, 1),
        "z": np.ones((ROWS, 1), "c16"),
    }
    values |= {"names": np.array(["a", "b"], object), "inside": {"w": numbers(3, 3)}}
    hdf5storage.writes(values, filename=str(path), matlab_compatible=True)


# netCDF


@maker
def netcdf4__era5_as_the_store_delivers_it(path: Path) -> None:
    import netCDF4

    with netCDF4.Dataset(path, "w") as file:
        for name, length in (("valid_time", ROWS), ("latitude", 9), ("longitude", 18), ("bnds", 2)):
            file.createDimension(name, length)
            if name != "bnds":
                file.createVariable(name, "f8", (name,))[:] = np.arange(length)
        file["valid_time"].setncatts({"units": "hours since 1990-1-1", "calendar": "standard"})
        axes = ("valid_time", "latitude", "longitude")
        field = file.createVariable("t2m", "i2", axes, fill_value=-32767)
        field.setncatts({"scale_factor": 0.01, "add_offset": 270.0, "units": "K"})
        field[:] = 270 + np.random.default_rng(0).random((ROWS, 9, 18))
        file.createVariable("number", "i8", ())[...] = 0
        file.createVariable("lsm", "f4", axes[1:])[:] = 1
        file.createVariable("expver", str, ("valid_time",))[:] = np.array(["0001"] * ROWS, object)


@maker
def netcdf4__cmip_without_leap_days(path: Path) -> None:
    import netCDF4

    with netCDF4.Dataset(path, "w") as file:
        for name, length in (("time", None), ("bnds", 2), ("lat", 4), ("height", 1)):
            file.createDimension(name, length)
        time = file.createVariable("time", "f8", ("time",))
        time.setncatts(
            {"units": "days since 1850-01-01", "calendar": "noleap", "bounds": "time_bnds"}
        )
        time[:] = np.arange(ROWS) * 30 + 15.5
        file.createVariable("time_bnds", "f8", ("time", "bnds"))[:] = 0
        file.createVariable("tas", "f4", ("time", "lat"), zlib=True)[:] = 1


@maker
def netcdf4__groups_and_user_types(path: Path) -> None:
    import netCDF4

    with netCDF4.Dataset(path, "w") as file:
        group = file.createGroup("forecast")
        group.createDimension("x", ROWS)
        pair = group.createCompoundType(np.dtype([("u", "f4"), ("v", "f4")]), "wind_type")
        group.createVariable("wind", pair, ("x",))[:] = np.zeros(ROWS, [("u", "f4"), ("v", "f4")])
        kinds = group.createEnumType("u1", "sky_type", {"clear": 0, "cloudy": 1})
        group.createVariable("sky", kinds, ("x",))[:] = np.zeros(ROWS, "u1")
        ragged = group.createVLType("f4", "profile_type")
        group.createVariable("profile", ragged, ("x",))[:] = np.array(
            [numbers(row % 3 + 1) for row in range(ROWS)], object
        )


@maker
def netcdf4__members_before_time(path: Path) -> None:
    import netCDF4

    with netCDF4.Dataset(path, "w") as file:
        for name, length in (("member", 3), ("time", ROWS), ("level", 4)):
            file.createDimension(name, length)
            file.createVariable(name, "i4", (name,))[:] = np.arange(length)
        file["time"].units = "days since 2000-01-01"
        file.createVariable("t", "f4", ("member", "time", "level"))[:] = numbers(3, ROWS, 4)


@maker
def netcdf4__every_filter_that_it_has(path: Path) -> None:
    import netCDF4

    with netCDF4.Dataset(path, "w") as file:
        file.createDimension("time", None)
        file.createDimension("x", 20)
        for name in ("zlib", "zstd", "bzip2", "szip"):
            try:
                made = file.createVariable(name, "f4", ("time", "x"), compression=name)
            except RuntimeError:  # this build has no such filter
                continue
            made[:] = numbers(ROWS, 20)


@maker
def esmf__weights_of_a_regridding(path: Path) -> None:
    import netCDF4

    with netCDF4.Dataset(path, "w") as file:
        for name, length in (("n_s", 40), ("n_a", 9), ("n_b", ROWS), ("num_wgts", 1)):
            file.createDimension(name, length)
        file.createVariable("S", "f8", ("n_s",))[:] = 0.5
        file.createVariable("col", "i4", ("n_s",))[:] = 1 + np.arange(40) % 9
        file.createVariable("row", "i4", ("n_s",))[:] = 1 + np.arange(40) % ROWS
        file.createVariable("frac_b", "f8", ("n_b",))[:] = 1


@maker
def xarray__by_h5netcdf(path: Path) -> None:
    import pandas as pd
    import xarray as xr

    times = pd.date_range("2001-02-03", periods=ROWS, freq="6h")
    data = {"u": (("time", "x"), numbers(ROWS, 5)), "mask": (("x",), np.ones(5, "i1"))}
    xr.Dataset(data, {"time": times}).to_netcdf(path, engine="h5netcdf")


@maker
def xarray__texts_bools_and_complex(path: Path) -> None:
    import xarray as xr

    data = {
        "u": (("sample", "x"), numbers(ROWS, 5)),
        "ok": (("sample",), np.ones(ROWS, bool)),
        "station": (("sample",), np.array(["north", "south"] * (ROWS // 2))),
        "z": (("sample",), np.ones(ROWS, "c8")),
    }
    xr.Dataset(data).to_netcdf(path, engine="h5netcdf", invalid_netcdf=True)


@maker
def xarray__packed_by_encoding(path: Path) -> None:
    import xarray as xr

    values = xr.Dataset({"t": (("time", "x"), 280 + numbers(ROWS, 6, dtype="f8") / 9)})
    packing = {"dtype": "i2", "scale_factor": 0.01, "add_offset": 280.0, "_FillValue": -9999}
    values.to_netcdf(path, engine="netcdf4", encoding={"t": packing})


@maker
def xarray__a_tree(path: Path) -> None:
    import xarray as xr

    data = xr.Dataset({"x": (("row", "y"), numbers(ROWS, 3))})
    xr.DataTree.from_dict({"/train": data, "/test": data.isel(row=slice(5))}).to_netcdf(path)


# Tables, in a process of their own


@maker
def pandas__a_table_and_a_fixed_frame(path: Path) -> None:
    import pandas as pd

    table = pd.DataFrame({"a": numbers(ROWS, dtype="f8"), "b": ["x", "y"] * (ROWS // 2)})
    table.to_hdf(path, key="table", format="table", mode="w")
    table[["a"]].to_hdf(path, key="fixed", format="fixed")


@maker
def pandas__columns_to_search_by(path: Path) -> None:
    import pandas as pd

    times = pd.date_range("2020", periods=ROWS)
    frame = pd.DataFrame({"x": numbers(ROWS), "n": numbers(ROWS, dtype="i8")}, times)
    frame.to_hdf(path, key="obs", format="table", data_columns=True, complevel=5, complib="zlib")


@maker
def pytables__arrays_of_all_kinds(path: Path) -> None:
    import tables

    with tables.open_file(str(path), "w") as file:
        file.create_array("/", "image", numbers(ROWS, 4, 4, dtype="u1"))
        rows = file.create_vlarray("/", "tokens", tables.Int32Atom())
        for row in range(ROWS):
            rows.append(list(range(row % 3 + 1)))
        file.create_earray("/", "grown", tables.Float32Atom(), (0, 2)).append(numbers(ROWS, 2))
        file.create_vlarray("/", "pickled", tables.ObjectAtom()).append({"a": 1})


@maker
def pytables__a_table_with_an_index(path: Path) -> None:
    import tables

    class Particle(tables.IsDescription):  # type: ignore[misc]
        name = tables.StringCol(8)
        energy = tables.Float64Col(shape=(2,))
        kind = tables.EnumCol(["up", "down"], "up", base="uint8")
        when = tables.Time64Col()
        flag = tables.BoolCol()

    with tables.open_file(str(path), "w") as file:
        table = file.create_table(
            "/", "particles", Particle, filters=tables.Filters(5, "blosc:zstd")
        )
        for number in range(ROWS):
            table.row["name"], table.row["energy"] = f"p{number % 3}", number
            table.row.append()
        table.flush()
        table.cols.name.create_index()


# Others


@maker
def anndata__cells_by_genes(path: Path) -> None:
    import anndata
    import pandas as pd
    from scipy import sparse

    values = sparse.random(ROWS, 6, 0.5, "csr", "f4", np.random.default_rng(0))
    kinds = pd.Categorical(["T", "B"] * (ROWS // 2))
    names = [f"cell{number}" for number in range(ROWS)]
    cells = anndata.AnnData(values, pd.DataFrame({"kind": kinds, "n": numbers(ROWS)}, names))
    cells.obsm["X_pca"] = numbers(ROWS, 2)
    cells.layers["dense"] = values.toarray()
    cells.write_h5ad(path)


@maker
def h5io__what_mne_writes(path: Path) -> None:
    import h5io

    h5io.write_hdf5(str(path), {"data": numbers(ROWS, 4), "names": ["a", "b"]}, overwrite=True)


@maker
def nexusformat__a_scan(path: Path) -> None:
    from nexusformat.nexus import NXdata, NXentry, NXfield, NXroot

    scan = NXdata(NXfield(numbers(ROWS, 5), name="counts"), NXfield(numbers(ROWS), name="angle"))
    NXroot(NXentry(scan)).save(str(path), "w")


@maker
def emcee__chains(path: Path) -> None:
    import emcee

    backend = emcee.backends.HDFBackend(str(path))
    sampler = emcee.EnsembleSampler(8, 2, lambda x: -0.5 * (x**2).sum(), backend=backend)
    sampler.run_mcmc(np.random.default_rng(0).normal(size=(8, 2)), ROWS)


@maker
def pynwb__a_recording(path: Path) -> None:
    import pynwb

    start = datetime(2020, 1, 1, tzinfo=timezone.utc)
    session = pynwb.NWBFile("a session", "an id", start)
    session.add_acquisition(pynwb.TimeSeries("voltage", numbers(ROWS, 3), "V", rate=10.0))
    for number in range(4):
        session.add_trial(start_time=float(number), stop_time=number + 0.5)
    for number in range(3):
        session.add_unit(spike_times=numbers(number + 2, dtype="f8"))
    with pynwb.NWBHDF5IO(str(path), "w") as file:
        file.write(session)


@maker
def openpmd__particles(path: Path) -> None:
    """As the standard lays them out: an iteration a group, constants as attributes."""
    with h5py.File(path, "w") as file:
        file.attrs["openPMD"] = "1.1.0"
        for step in (0, 100, 200):
            particles = file.create_group(f"data/{step}/particles/e")
            particles["position/x"], particles["position/y"] = numbers(ROWS), numbers(ROWS)
            particles.create_group("mass").attrs.update({"value": 1.0, "shape": [ROWS]})


@maker
def hdf5plugin__every_filter(path: Path) -> None:
    import hdf5plugin

    with h5py.File(path, "w") as file:
        for name in ("Zstd", "LZ4", "Blosc", "Blosc2", "Bitshuffle", "BZip2"):
            made = getattr(hdf5plugin, name)()
            file.create_dataset(name, data=numbers(ROWS, 9), chunks=(4, 9), compression=made)
        zfp = hdf5plugin.Zfp(reversible=True)
        file.create_dataset("Zfp", data=numbers(ROWS, 9), chunks=(4, 9), compression=zfp)


@maker
def hdf5__a_filter_that_nobody_has(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file["x"] = numbers(ROWS, 2)
        properties = h5p.create(h5p.DATASET_CREATE)
        properties.set_chunk((4,))
        properties.set_filter(32768 - 1 + 300, h5py.h5z.FLAG_OPTIONAL, (1, 2))
        h5d.create(file.id, b"odd", h5t.IEEE_F32LE, h5s.create_simple((ROWS,)), properties)


def _packed(source: list[str], path: Path) -> None:
    """Pack a source by hpctrain itself, and put the one shard where a file is expected."""
    from hpctrain.cli import main

    folder = path.with_suffix("")
    assert main(["data", "pack", *source, str(folder)]) == 0
    (shard,) = folder.glob("*.h5")
    shard.rename(path)


@maker
def zarr__packed(path: Path) -> None:
    import zarr

    store = path.with_suffix(".zarr")
    group = zarr.open_group(store, mode="w")
    group.create_array("x", shape=(ROWS, 3), dtype="f4", chunks=(4, 3))[:] = numbers(ROWS, 3)
    _packed([str(store)], path)


@maker
def pyarrow__packed(path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    vectors = pa.FixedSizeListArray.from_arrays(pa.array(numbers(3 * ROWS)), 3)
    table = pa.table({"x": vectors, "label": pa.array(numbers(ROWS, dtype="i8"))})
    parquet.write_table(table, path.with_suffix(".parquet"))
    _packed([f"{name}={path.with_suffix('.parquet')}:{name}" for name in ("x", "label")], path)


if __name__ == "__main__":
    for name, make in MAKERS.items():
        if name.startswith(APART):
            _quietly(make, path_of(Path(sys.argv[1]), name))
