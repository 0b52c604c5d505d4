"""Sources behind a URL: real servers on this machine, an S3 and a plain one."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import boto3
import numpy as np
import pandas as pd
import pytest
import s3fs
import zarr
from helpers.packing import packed_values, run
from moto.server import ThreadedMotoServer
from PIL import Image

from hpctrain.convert.sources import remote
from hpctrain.errors import DatasetError

VALUES = np.arange(60).reshape(20, 3)


def fill(folder: Path) -> None:
    folder.mkdir()
    np.save(folder / "x-2.npy", VALUES[:9])
    np.save(folder / "x-10.npy", VALUES[9:])
    pd.DataFrame({"label": np.arange(20)}).to_parquet(folder / "label.parquet")
    for name in ("cat", "dog"):
        (folder / "photos" / name).mkdir(parents=True)
        Image.new("RGB", (4, 3), (name == "dog" and "white") or "red").save(
            folder / "photos" / name / "a b.png"
        )


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def http(tmp_path: Path) -> Iterator[str]:
    fill(tmp_path / "served")
    handler = functools.partial(Quiet, directory=str(tmp_path / "served"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.fixture
def s3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    fill(tmp_path / "objects")
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    for name, value in {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": "somebody",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    client = boto3.client("s3", endpoint_url=url)
    client.create_bucket(Bucket="bucket")
    for path in (tmp_path / "objects").rglob("*"):
        if path.is_file():
            client.upload_file(
                str(path), "bucket", f"deep/{path.relative_to(tmp_path / 'objects')}"
            )
    yield "s3://bucket/deep"
    server.stop()


@pytest.fixture(params=["http", "s3"])
def place(request: pytest.FixtureRequest) -> str:
    return str(request.getfixturevalue(request.param))


def test_files_behind_a_url(tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    pack = (f"x={place}/x-*.npy", f"{place}/label.parquet:label", str(out), "--shard-rows", "6")
    assert "packed 20 samples" in run(*pack)
    values = packed_values(out)
    np.testing.assert_array_equal(values["x"], VALUES)  # 2 before 10
    np.testing.assert_array_equal(values["label"], np.arange(20))
    assert not list(tmp_path.glob(".out*"))
    with monkeypatch.context() as patched:
        patched.setattr(remote, "fetch", None)
        assert "packed already" in run(*pack)

    photos = tmp_path / "photos"
    run(f"{place}/photos/", str(photos))
    values = packed_values(photos)
    assert values["image"].shape == (2, 3, 3, 4)
    assert values["label"].tolist() == [0, 1]
    assert values["image"][1].min() == 255
    with pytest.raises(DatasetError, match=r"nothing-\*\.npy: no file has such a name there"):
        run(f"{place}/nothing-*.npy", str(tmp_path / "none"))


def test_what_was_copied_is_not_copied_again(
    tmp_path: Path, http: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch, copied = remote.fetch, []

    def fail(copy: remote.Copy, path: Path) -> None:
        if copied:
            raise DatasetError("the cable was pulled")
        copied.append(path)
        fetch(copy, path)

    monkeypatch.setattr(remote, "fetch", fail)
    pack = (f"x={http}/x-*.npy", str(tmp_path / "out"))
    with pytest.raises(DatasetError, match="cable"):
        run(*pack)
    monkeypatch.setattr(remote, "fetch", fetch)
    assert copied[0].name == "x-10.npy"
    np.save(copied[0], -VALUES[9:])
    run(*pack)
    values = packed_values(tmp_path / "out")["x"]
    np.testing.assert_array_equal(values, np.concatenate([VALUES[:9], -VALUES[9:]]))


def test_zarr_is_read_where_it_is(tmp_path: Path, s3: str) -> None:
    system = s3fs.S3FileSystem()
    for version in (2, 3):
        store = zarr.storage.FsspecStore.from_url(f"{s3}/{version}.zarr")
        group = zarr.create_group(store, zarr_format=version)
        group.create_array("x", data=VALUES, chunks=(4, 3))
        group.create_array("unwanted", data=VALUES[:3], chunks=(1, 3))
        if version == 2:
            zarr.consolidate_metadata(store)
        out = tmp_path / f"out-{version}"
        assert "packed 20 samples" in run(f"{s3}/{version}.zarr:x", str(out))
        np.testing.assert_array_equal(packed_values(out)["x"], VALUES)
    assert system.exists(f"{s3}/2.zarr/.zmetadata")


def test_secrets_of_a_url_are_not_told() -> None:
    assert remote.public("https://me:pw@host/x.npy?sig=1") == "https://host/x.npy"
    assert remote.public("plain?.npy") == "plain?.npy"


def test_servers_that_say_no(tmp_path: Path, http: str) -> None:
    out = str(tmp_path / "out")
    for url, words in {
        f"{http}/missing.npy?key=secret": r"missing\.npy: ",
        "http://127.0.0.1:1/x.npy": "127.0.0.1:1/x.npy: cannot be read",
        "nosuch://host/x.npy": "nosuch://host/x.npy: ",
    }.items():
        with pytest.raises(DatasetError, match=words) as raised:
            run(url, out)
        assert "secret" not in str(raised.value)
