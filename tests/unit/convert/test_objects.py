"""torch Datasets and streams, packed."""

from __future__ import annotations

from pathlib import Path

import h5py
import pytest

from hpctrain.cli import main

PACK = ("data", "pack")


def test_datasets_and_streams_are_packed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of tuples by their places; a stream leaves nothing behind but its shards."""
    reference = "dataset=helpers.user_data:Stream"
    assert main([*PACK, reference, str(tmp_path / "s")]) == 0
    assert "packed 7 samples" in capsys.readouterr().out
    assert [each.name for each in tmp_path.iterdir()] == ["s"]
    with h5py.File(tmp_path / "s" / "shard-000000.h5") as file:
        assert file["y"][:].tolist() == list(range(7))
        assert file["x"][3].tolist() == [3.0, 3.0]
    assert main([*PACK, reference, str(tmp_path / "s")]) == 0
    assert "packed already" in capsys.readouterr().out
    assert main([*PACK, "dataset=helpers.user_data:Images", str(tmp_path / "i")]) == 0
    with h5py.File(tmp_path / "i" / "shard-000000.h5") as file:
        assert file["0"].shape == (50, 8, 8)  # PIL images
        assert file["1"][12] == 2


@pytest.mark.parametrize(
    ("source", "code", "expected"),
    [
        ("Texts", 65, '"name" of sample 0 is str, which is no number: leave it out'),
        ("Graphs", 65, '"x" of sample 1 is float32 (3, 3), and of the first float32 (2, 3)'),
        ("Bad", 78, "it is called without arguments: missing a required argument: 'how'"),
        ("Nothing", 78, "has no 'Nothing'"),
    ],
)
def test_what_cannot_be_packed(
    source: str, code: int, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*PACK, f"dataset=helpers.user_data:{source}", str(tmp_path / "p")]) == code
    assert expected in capsys.readouterr().err
