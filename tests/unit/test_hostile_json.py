"""JSON of ours in which anything may stand ends in an error of ours, or in values that fit."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
import xxhash

from hpctrain.batch.exit_status import Outcome, newest_saved, read_status, to_text, write_outcome
from hpctrain.checkpoint import inspect
from hpctrain.checkpoint.export import export
from hpctrain.checkpoint.format import read_meta, resolved
from hpctrain.checkpoint.lease import Lease
from hpctrain.checkpoint.load import load
from hpctrain.checkpoint.manager import CheckpointManager, Retention
from hpctrain.checkpoint.save import Snapshot
from hpctrain.convert.index import make_catalogue
from hpctrain.convert.pack import _begun
from hpctrain.convert.stats import measure
from hpctrain.data.files.catalogue import read_catalogue
from hpctrain.data.files.discovery import open_dataset
from hpctrain.data.files.index import read_index, read_origin
from hpctrain.data.stats import read_stats, write_stats
from hpctrain.data.writer import Writer
from hpctrain.errors import CheckpointError, ConfigError, DatasetError, HpctrainError
from hpctrain.observe.records import from_line
from hpctrain.training.checkpointing.values import check_values
from hpctrain.training.inference.loaded_model import load_model
from hpctrain.utils.json_files import read_checked

CONTENTS: dict[str, bytes] = {
    "nothing": b"",
    "null": b"null",
    "true": b"true",
    "a number": b"7",
    "a long number": b"9" * 5000,
    "text": b'"x"',
    "a list": b"[[1, 2], 3]",
    "an object": b'{"version": "1", "kind": [], "files": 3, "format": {}}',
    "deep lists": b"[" * 100_000 + b"]" * 100_000,
    "deep objects": b'{"a":' * 100_000,
    "zeros": bytes(4096),
    "not UTF-8": b'\xff\xfe{"a": "\xe4"}',
    "no text": b'{"a": "\\u0000", "b": "\\ud800"}',
    "cut": b'{"code": 75, "reason": "sto',
}
VALUES: tuple[Any, ...] = (
    None,
    True,
    -1,
    2**70,
    1.5,
    float("nan"),
    "x",
    "\0",
    "\ud800",
    "../../x",
    [],
    {},
    [[]],
)


def places(document: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield where each value of a document stands, itself included."""
    yield at
    if isinstance(document, dict | list):
        for key in document if isinstance(document, dict) else range(len(document)):
            yield from places(document[key], (*at, key))


def mutants(document: Any) -> Iterator[Any]:
    """Yield the document with one value changed or left out, for each value in it."""
    for place in list(places(document)):
        if not place:
            continue
        for value in (*VALUES, ...):
            mutant = copy.deepcopy(document)
            parent = mutant
            for key in place[:-1]:
                parent = parent[key]
            if value is ...:
                del parent[place[-1]]
            else:
                parent[place[-1]] = value
            yield mutant


def assert_told(read: Callable[[], object], kind: type[HpctrainError]) -> bool:
    """Read; what fails must do so by an error of ours that can be printed. Return if it did."""
    try:
        read()
    except kind as error:
        told = str(error)
    else:
        return False
    assert "\0" not in told.encode().decode()
    return True


def hold(
    path: Path,
    read: Callable[[], object],
    kind: type[HpctrainError],
    signed: Callable[[Any], Any] = lambda document: document,
) -> None:
    """Try everything on a file that `read` can read as it is."""
    good = path.read_bytes()
    read()
    for label, content in CONTENTS.items():
        path.write_bytes(content)
        assert assert_told(read, kind), label
    for mutant in mutants(json.loads(good)):
        path.write_text(json.dumps(signed(mutant)), encoding="utf-8")
        assert_told(read, kind)
    path.unlink()
    os.mkfifo(path)
    assert assert_told(read, kind), "a pipe"
    path.unlink()
    with path.open("wb") as file:
        file.truncate(2**32)
    assert assert_told(read, kind), "huge"
    path.write_bytes(good)
    read()


def test_exit_json(tmp_path: Path) -> None:
    write_outcome(tmp_path, Outcome(code=75, reason="stopped", step=3, tries=1, job="slurm 7.0"))

    def read() -> None:
        to_text(tmp_path, read_status(tmp_path, {})).encode()

    hold(tmp_path / "exit.json", read, CheckpointError)


def test_an_exit_code_that_the_system_would_cut_to_0_is_refused(tmp_path: Path) -> None:
    document = {"code": 256, "reason": "x", "step": 3, "tries": 1}
    (tmp_path / "exit.json").write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(CheckpointError, match="code is 256"):
        read_status(tmp_path, {})


@pytest.mark.parametrize(
    "content",
    [b"", b"\n", bytes(99), b"\xff", b"../../etc", b".", b"a\nb", b"x" * 2**13, b"\x1b[2J"],
)
def test_latest(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "latest").write_bytes(content)
    assert assert_told(lambda: newest_saved(tmp_path), CheckpointError)
    assert assert_told(lambda: resolved(tmp_path), CheckpointError)


def test_lease_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hpctrain.checkpoint.lease.time.sleep", lambda _: None)
    path = tmp_path / "lease.json"
    with Lease(tmp_path, {"SLURM_JOB_ID": "7"}):
        good = json.loads(path.read_bytes())
    good["host"] = "elsewhere"
    for content in (*CONTENTS.values(), *(json.dumps(each).encode() for each in mutants(good))):
        path.write_bytes(content)

        def take() -> None:
            with Lease(tmp_path, {}):
                raise AssertionError("nobody knows that its holder is gone")

        assert assert_told(take, CheckpointError)


def signed_meta(document: Any) -> Any:
    """Return meta.json with the checksum of its content, as one who knows could forge it."""
    rest = {key: value for key, value in document.items() if key != "xxh3_64"}
    text = json.dumps(rest, sort_keys=True).encode()
    return rest | {"xxh3_64": xxhash.xxh3_64_hexdigest(text)}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    weight = torch.arange(6.0).reshape(2, 3)
    place = {"step": 4, "epoch": 0, "position": 8, "samples_seen": 8}
    store = CheckpointManager(
        tmp_path, retention=Retention(keep_last=1), confirm=lambda: None, warn=print
    )
    store.save(
        Snapshot(
            step=4,
            model={"weight": weight, "tied": weight},
            training={"bad_steps": torch.zeros(3)},
            values={
                "place": place,
                "data": {"version": 1},
                "world_size": 1,
                "device": "cpu",
                "threads": 1,
                "scaler": {"scale": 2.0},
                "generators": [{"numpy": ["MT19937", 1, 0, 0.0], "python": [3, None]}],
                "total_steps": 9,
                "lr": 0.1,
                "schedule": {"metric": "loss", "best": None},
                "metrics": {"loss": 1.0},
                "best": ["loss", 1.0, 4],
                "evaluation_owed": False,
            },
            config_toml="[run]\n",
            metrics={"loss": 1.0},
        )
    )
    store.finish()
    return tmp_path / "checkpoints" / "step-00000004"


def test_meta_json(checkpoint: Path) -> None:
    def read() -> None:
        read_meta(checkpoint)
        inspect.listed(checkpoint.parents[1])
        load(checkpoint)

    hold(checkpoint / "meta.json", read, CheckpointError, signed_meta)


@pytest.mark.parametrize("name", ["/dev/zero", "../../x", "a/b", "..", "a\nb", "\x1b[2J"])
def test_files_of_a_checkpoint_are_beside_its_meta_json(checkpoint: Path, name: str) -> None:
    meta = json.loads((checkpoint / "meta.json").read_bytes())
    meta["files"][name] = {"bytes": 2**40, "xxh3_64": "0" * 16}
    (checkpoint / "meta.json").write_text(json.dumps(signed_meta(meta)), encoding="utf-8")
    with pytest.raises(CheckpointError, match="is not the name of a file beside it") as caught:
        inspect.verified(checkpoint)
    assert all(line.isprintable() for line in str(caught.value).splitlines())


def test_names_that_a_checkpoint_does_not_have(checkpoint: Path, tmp_path: Path) -> None:
    meta = json.loads((checkpoint / "meta.json").read_bytes())
    meta["aliases"] = {"tied": "\x1b[2J"}
    (checkpoint / "meta.json").write_text(json.dumps(signed_meta(meta)), encoding="utf-8")
    with pytest.raises(CheckpointError, match="is damaged"):
        export(checkpoint, tmp_path / "weights.safetensors")


def test_no_escape_of_a_header_is_printed(tmp_path: Path) -> None:
    header = b'{"a": {"dtype": "\\u001b[2J", "shape": [1], "data_offsets": [0, 4]}}'
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"1234")
    with pytest.raises(CheckpointError, match="cannot be read") as caught:
        load_model(path)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "spread",
    [
        {"ranks": 2},
        {"ranks": 2, "model.safetensors": {}},
        {"ranks": 2, "model.safetensors": 3, "training.safetensors": {}},
        {"ranks": 2, "model.safetensors": {"weight": []}, "training.safetensors": {}},
        {"ranks": {}, "model.safetensors": {}, "training.safetensors": {}},
        {"ranks": 2, "group": {}, "model.safetensors": {}, "training.safetensors": {}},
    ],
)
def test_a_spread_that_is_not_whole(checkpoint: Path, tmp_path: Path, spread: Any) -> None:
    meta = json.loads((checkpoint / "meta.json").read_bytes())
    meta["spread"] = spread
    (checkpoint / "meta.json").write_text(json.dumps(signed_meta(meta)), encoding="utf-8")
    target = tmp_path / "weights.safetensors"
    for read in (lambda: load(checkpoint), lambda: export(checkpoint, target)):
        with pytest.raises(CheckpointError, match=r"meta\.json is damaged: spread"):
            read()


def test_training_json(checkpoint: Path) -> None:
    path = checkpoint / "training.json"
    meta = json.loads((checkpoint / "meta.json").read_bytes())

    def read() -> None:
        """Read it with its checksum right, as if it had been written so."""
        if path.is_file() and path.stat().st_size < 2**24:
            content = path.read_bytes()
            digest = xxhash.xxh3_64_hexdigest(content)
            meta["files"]["training.json"] = {"bytes": len(content), "xxh3_64": digest}
            text = json.dumps(signed_meta(meta))
            (checkpoint / "meta.json").write_text(text, encoding="utf-8")
        check_values(load(checkpoint))

    hold(path, read, CheckpointError)


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    with Writer(folder) as out:
        out.extend({"x": np.arange(12, dtype="f4").reshape(4, 3), "y": np.arange(4)})
    return folder


def test_index_json(dataset: Path) -> None:
    def read() -> None:
        read_origin(dataset)
        read_index(dataset)

    hold(dataset / "index.json", read, DatasetError)


def test_stats_json(dataset: Path) -> None:
    opened, path = open_dataset(str(dataset)), dataset / "stats.json"
    write_stats(measure(opened, jobs=1), path)
    hold(path, lambda: read_stats(path, opened, ["x"]), DatasetError)


def test_statistics_that_are_no_numbers_are_refused(dataset: Path) -> None:
    opened, path = open_dataset(str(dataset)), dataset / "stats.json"
    stats = measure(opened, jobs=1)
    stats["fields"]["x"]["channels"]["std"][1] = float("nan")
    write_stats(stats, path)
    with pytest.raises(DatasetError, match=r"fields\.x\.channels\.std\.1"):
        read_stats(path, opened, ["x"])


def test_catalogue(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.nc", "w") as file:
        file.create_dataset("zipped", data=np.arange(8), chunks=(3,), compression="gzip")
        file["plain"] = np.ones(3)
    path = tmp_path / "all.json"
    make_catalogue(str(tmp_path / "a.nc"), path, jobs=1)
    hold(path, lambda: read_catalogue(path), DatasetError)


def test_what_a_killed_packer_left(tmp_path: Path) -> None:
    path = tmp_path / "index.json.unfinished"
    for content in CONTENTS.values():
        path.write_bytes(content)
        _begun(path)


def test_lines_of_metrics() -> None:
    for content in CONTENTS.values():
        assert from_line(content + b"\n") is None
    assert from_line(b'{"kind": "train", "step": true}\n') is None
    assert from_line(b'{"kind": 3, "step": 1}\n') is None
    assert from_line(b'{"kind": "train", "step": 1}\n') == {"kind": "train", "step": 1}


def test_what_is_wrong_is_named_in_a_line(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"a": [1, 2, "three"]}', encoding="utf-8")
    with pytest.raises(ValueError, match=r"a\.2: 'three' is not a valid integer"):
        read_checked(path, dict[str, list[int]])
    with pytest.raises(ConfigError):
        read_status(tmp_path, {})
