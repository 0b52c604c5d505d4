"""Compiled kernels are kept where nobody else can put any, and handed on as one archive."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from helpers.worlds import world_of_one

from hpctrain.training import compile_cache
from hpctrain.training.compile_cache import ARCHIVE, bring_back, keep_on_node


def test_a_folder_of_this_users_alone(tmp_path: Path) -> None:
    environ = {"TRITON_CACHE_DIR": "mine"}
    folder = keep_on_node(environ, str(tmp_path))
    assert folder is not None
    assert folder.stat().st_mode & 0o077 == 0
    assert environ["TRITON_CACHE_DIR"] == "mine"
    assert environ["TORCHINDUCTOR_CACHE_DIR"] == str(folder / "inductor")
    assert keep_on_node({}, str(tmp_path)) == folder, "the other ranks of the node use it too"


def test_a_planted_folder_is_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / f"hpctrain-compiled-{os.geteuid()}").symlink_to(tmp_path / "theirs")
    environ: dict[str, str] = {}
    assert keep_on_node(environ, str(tmp_path)) is None
    assert environ == {}
    assert "compiled kernels are kept where the compilers keep them" in caplog.text


@pytest.mark.parametrize("mode", [0o620, 0o602])
def test_an_archive_that_others_may_write_to_is_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, mode: int
) -> None:
    loaded: list[bytes] = []
    monkeypatch.setattr(
        compile_cache.torch.compiler, "load_cache_artifacts", loaded.append, raising=False
    )
    archive = tmp_path / ARCHIVE
    archive.write_bytes(b"kernels")
    archive.chmod(mode)
    bring_back(world_of_one("test"), tmp_path)
    assert loaded == []
    assert "others own it or may write to it" in caplog.text
    archive.chmod(0o600)
    bring_back(world_of_one("test"), tmp_path)
    assert loaded == [b"kernels"]
    (tmp_path / "link").mkdir()
    (tmp_path / "link" / ARCHIVE).symlink_to(archive)
    bring_back(world_of_one("test"), tmp_path / "link")
    assert loaded == [b"kernels"]
