"""What verify, stats and bench do not look at, they name."""

from __future__ import annotations

import json
from pathlib import Path

import h5py
import numpy as np
import pytest

from hpctrain.cli import main
from hpctrain.convert.unseen import not_looked_at, unseen_arrays, unseen_files


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with more in it than makes a dataset."""
    monkeypatch.chdir(tmp_path)
    Path("data/old").mkdir(parents=True)
    with h5py.File("data/a.h5", "w") as file:
        file["x"], file["y"] = np.arange(8.0), np.zeros(8, "c8")
        file["lonely"] = 3.0
        file["long"] = np.arange(5)
        for number in range(4):
            file[f"demo_{number}/obs"] = np.zeros(3)
        file["table"] = np.zeros(8, [("pt", "f4"), ("eta", "f4")])
        file["alias"], file["gone"] = h5py.SoftLink("/x"), h5py.SoftLink("/nowhere")
        file["away"] = h5py.ExternalLink("old/b.h5", "x")
    for name in ("old/b.h5", ".hidden.h5"):
        with h5py.File(f"data/{name}", "w") as file:
            file["x"] = np.arange(3)
    with h5py.File("data/c.mat", "w") as file:
        file["x"] = np.arange(3)
    Path("data/notes.mat").write_text("no HDF5", encoding="utf-8")
    return tmp_path


def told(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    assert main(["data", *arguments]) == code
    captured = capsys.readouterr()
    return captured.err if code else captured.out


ARRAYS = (
    "away (a link to elsewhere), 4 of demo_*/obs, gone (a link to elsewhere), lonely, long, {table}"
)
FILES = "2 files: c.mat, old/b.h5"


def test_tools_name_what_they_leave_out(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fields = ("data", "--fields", "x,y")
    rest = f"not looked at: {ARRAYS.format(table='table')}; {FILES}"
    assert told(capsys, "verify", *fields, "--jobs", "1").splitlines()[1] == rest
    # Complex numbers have no statistics here.
    lines = told(capsys, "stats", *fields, "--jobs", "1", "--out", "stats.json").splitlines()
    assert lines[-1] == rest.replace("table;", "table, y (complex);")
    bench = ("bench", *fields, "--batch", "4", "--seconds", "1")
    assert json.loads(told(capsys, *bench, "--json"))["not_looked_at"] == rest
    # Of a table, what is not one of the members that are looked at; and by a link, the array.
    by_link = ("data", "--fields", "alias,table/pt")
    lines = told(capsys, "verify", *by_link, "--jobs", "1").splitlines()
    assert lines[1] == f"not looked at: {ARRAYS.format(table='table/eta, y')}; {FILES}"
    assert "not looked at" in told(capsys, "verify", *fields, "--range", "x=0:3", code=65)


def test_nothing_is_said_where_all_was_looked_at(
    site: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save("x.npy", np.arange(8.0))
    assert main(["data", "pack", "x.npy", "packed"]) == 0
    for tool in ("verify", "stats"):
        assert "not looked at" not in told(capsys, tool, "packed", "--jobs", "1")


def test_a_catalogue_alone_says_that_no_field_was_looked_at(
    site: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told(capsys, "index", "data/a.h5", "--out", "all.json", "--fields", "x,long", "--jobs", "1")
    said = told(capsys, "verify", "all.json", "--jobs", "1")
    assert said.splitlines()[1] == (
        "not looked at: away (a link to elsewhere), gone (a link to elsewhere); verified by the "
        "checksums of files alone: 4 of demo_*/obs, lonely, long, table, x, y"
    )


def test_images_that_were_packed_are_checked_by_their_checksum_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = pytest.importorskip("PIL.Image")
    (tmp_path / "photos").mkdir()
    image.new("RGB", (9, 9)).save(tmp_path / "photos" / "0.png")
    out = str(tmp_path / "out")
    assert main(["data", "pack", str(tmp_path / "photos"), out, "--encoded"]) == 0
    capsys.readouterr()
    assert told(capsys, "verify", out, "--jobs", "1").splitlines()[1] == (
        "verified by the checksums of files alone: image"
    )


def test_words() -> None:
    assert not_looked_at([], []) == ""
    names = [f"a{chr(97 + number)}" for number in range(26)]
    assert "and 16 more" in not_looked_at(names, [])
    assert unseen_files("nothing/*.h5") == []
    both = not_looked_at(["x"], ["a.h5"], has_checksums=True)
    assert both == "not looked at: 1 file: a.h5; verified by the checksums of files alone: x"


def test_names_that_are_no_text(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file[b"\xff"] = np.arange(3)
        file["x"] = np.arange(3)
        file["nothing"] = h5py.Empty("f4")
    assert unseen_arrays(str(tmp_path / "a.h5"), ["x"]) == {"\\xff"}
