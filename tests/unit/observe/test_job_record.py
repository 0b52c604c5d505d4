"""What a job notes of itself: code, surroundings, and nothing that could open a door."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.limits import JOB_SECONDS

from hpctrain.observe import code, job_record, redacting
from hpctrain.observe.code import module_changes, modules_now, repository_at, root_of, user_modules
from hpctrain.observe.job_record import JobRecord

IDENTITY = ("-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "protocol.file.allow=always")


def git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *IDENTITY, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def project(tmp_path: Path) -> Path:
    folder = tmp_path / "project"
    folder.mkdir()
    git(folder, "init", "-q", "-b", "main")
    (folder / "my_models.py").write_text("width = 3\n", encoding="utf-8")
    git(folder, "add", ".")
    git(folder, "commit", "-q", "-m", "first")
    return folder


def changed(project: Path, text: str = "width = 4\n") -> Path:
    (project / "my_models.py").write_text(text, encoding="utf-8")
    return project


def on_path(folder: Path, script: str) -> str:
    """Return a PATH on which git is this script."""
    folder.mkdir()
    (folder / "git").write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    (folder / "git").chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def test_a_repository_is_noted_so_that_the_code_can_be_made_again(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = git(project, "rev-parse", "HEAD")
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setenv("GIT_DIR", "/nowhere")  # as in a hook of another repository
    assert root_of(project / "deeper" / "still") == project
    clean = repository_at(project)
    assert (clean.commit, clean.dirty, clean.diff, clean.note) == (commit, False, "", None)
    (project / "new.py").touch()
    found = repository_at(changed(project))
    assert (found.commit, found.dirty, found.untracked) == (commit, True, ["new.py"])
    monkeypatch.delenv("GIT_DIR")
    git(project, "checkout", "-q", "my_models.py")
    subprocess.run(["git", "-C", project, "apply"], input=found.diff, text=True, check=True)
    assert (project / "my_models.py").read_text(encoding="utf-8") == "width = 4\n"


def test_the_commit_is_found_without_git_however_it_is_written_down(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = git(project, "rev-parse", "HEAD")
    places = [project]
    git(project, "worktree", "add", "-q", str(tmp_path / "further"))
    git(tmp_path, "clone", "-q", str(project), "outer")
    git(tmp_path / "outer", "submodule", "--quiet", "add", str(project), "inner")
    git(tmp_path, "clone", "-q", str(project), "packed")
    git(tmp_path / "packed", "pack-refs", "--all")
    git(tmp_path, "clone", "-q", str(project), "detached")
    git(tmp_path / "detached", "checkout", "-q", "--detach")
    names = ("further", "outer", "outer/inner", "packed", "detached")
    places += [tmp_path / name for name in names]
    git(tmp_path, "init", "-q", "unborn")
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    for place in places:
        found = repository_at(place)
        assert found.commit == commit, place
        assert found.note is not None
        assert found.note.startswith("git cannot be started")
    assert repository_at(tmp_path / "unborn").commit is None


def test_changes_inside_a_submodule_are_part_of_the_diff(project: Path, tmp_path: Path) -> None:
    git(tmp_path, "clone", "-q", str(project), "outer")
    git(tmp_path / "outer", "submodule", "--quiet", "add", str(project), "inner")
    git(tmp_path / "outer", "commit", "-q", "-m", "second")
    changed(tmp_path / "outer" / "inner")
    found = repository_at(tmp_path / "outer")
    assert found.dirty
    assert "+width = 4" in found.diff


def test_a_large_diff_is_cut(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(code, "MOST_DIFF_BYTES", 1000)
    found = repository_at(changed(project, "x = 1\n" * 100_000))
    assert found.diff_is_cut
    assert len(found.diff) == 1000
    assert found.dirty


def test_another_users_repository_is_not_given_to_git(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its settings may name programs, which git would execute."""
    commit = git(project, "rev-parse", "HEAD")
    marker = project.parent / "executed"
    git(project, "config", "core.fsmonitor", f"touch {marker}; false")
    monkeypatch.setattr(os, "geteuid", lambda: project.stat().st_uid + 1)
    found = repository_at(changed(project))
    assert (found.commit, found.dirty) == (commit, None)
    assert "belongs to user" in str(found.note)
    assert not marker.exists()


def test_a_git_that_hangs_is_given_up(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", on_path(tmp_path / "bin", "sleep 1000 & wait"))
    found = repository_at(project, limit_seconds=0.2)
    assert found.commit is not None
    assert found.dirty is None
    assert found.note == "git status took too long"


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait for a record on a busy machine, too."""
    monkeypatch.setattr(job_record, "_PATIENCE_SECONDS", JOB_SECONDS)


@pytest.fixture
def my_module(project: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(project)
    monkeypatch.syspath_prepend(str(project))
    importlib.import_module("my_models")
    yield project / "my_models.py"
    del sys.modules["my_models"]


def test_the_users_modules_are_those_of_no_package(my_module: Path) -> None:
    found = user_modules()
    assert found["my_models"] == my_module
    assert not any(name.startswith(("hpctrain", "pytest", "json", "numpy")) for name in found)
    before = modules_now()
    assert before["my_models"]["file"] == "my_models.py"
    my_module.write_text("width = 5\n", encoding="utf-8")
    assert module_changes(before, modules_now(), 1200) == [
        "code: my_models.py changed since step 1,200"
    ]


def test_how_modules_differ_is_told_in_few_lines() -> None:
    then = {name: {"file": f"{name}.py", "xxh3": "0"} for name in "abcdefgh"}
    now = {name: {"file": f"{name}.py", "xxh3": str(name != "a")} for name in "abcdefgz"}
    assert module_changes(then, then, 3) == []
    # Two folders may hold the same: what counts is the module.
    moved = {name: {**facts, "file": f"/copy/{name}.py"} for name, facts in then.items()}
    assert module_changes(then, moved, 3) == []
    assert module_changes(then, {**now, "a": then["a"]}, 3) == [
        "code: b.py, c.py, d.py, e.py and 2 more changed since step 3",
        "code: z.py now imported, and not at step 3",
        "code: h.py no longer imported, as at step 3",
    ]


def test_variables_that_open_doors_are_not_noted() -> None:
    kept = {
        "OMP_NUM_THREADS": "4",
        "NCCL_DEBUG": "INFO",
        "SLURM_JOB_ID": "4711",
        "LD_LIBRARY_PATH": "/opt/lib",
        "CUDA_VISIBLE_DEVICES": "0,1",
    }
    secret = {
        "SLURM_JWT": "x",
        "WANDB_API_KEY": "x",
        "HF_TOKEN": "x",
        "AWS_SECRET_ACCESS_KEY": "x",
        "NCCL_AUTH_TOKEN": "x",
        "UCX_PASSWORD": "x",
        "OMPI_MCA_secret": "x",
        "PYTHONPATH": "https://me:word@host/simple",
        "TORCH_MIRROR": "https://word@host",
        "PIP_INDEX_URL": "https://me:word@host/simple",
        "ANYTHING": "x",
    }
    assert job_record.variables(kept | secret) == kept


def test_what_looks_like_a_secret_in_a_command_is_left_out() -> None:
    words = ["python", "run.toml", "model.vocab_tokens=50", "logging.api_key=abc", "x.token = y"]
    words += ["data.train=https://me:word@host/x", "--password=a\nb"]
    found = redacting.without_secrets(words)
    assert found[:3] == words[:3]
    assert found[3] == "logging.api_key=(not recorded)"
    assert not any(secret in " ".join(found) for secret in ("abc", "word@", "= y", "a\nb"))


def test_packages_are_those_that_would_be_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from importlib.metadata import version

    assert job_record.packages()["numpy"] == version("numpy")
    (tmp_path / "numpy-0.0.1.dist-info").mkdir()
    (tmp_path / "my_package-1.2.dev3+g1a.dist-info").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert job_record.packages()["numpy"] == "0.0.1"
    assert job_record.packages()["my-package"] == "1.2.dev3+g1a"


def test_driver_and_image_as_their_makers_name_them(tmp_path: Path) -> None:
    version = tmp_path / "driver" / "nvidia" / "version"
    version.parent.mkdir(parents=True)
    version.write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build\n",
        encoding="utf-8",
    )
    assert job_record.driver(tmp_path, tmp_path) == "NVIDIA 580.95.05"
    assert job_record.driver(tmp_path / "none", tmp_path / "none") is None
    assert job_record.image({"APPTAINER_CONTAINER": "/images/a.sif"}, tmp_path) == "/images/a.sif"
    assert job_record.image({}, tmp_path) is None


def read(run: Path, number: int) -> dict[str, object]:
    found: dict[str, object] = json.loads((run / "jobs" / f"{number}.json").read_bytes())
    return found


def test_every_job_has_a_record_of_its_own(
    my_module: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for number in (1, 2):
        record = JobRecord(run)
        record.begin({"run": "x"})
        record.note_modules()
        assert record.modules() == modules_now()
        assert record.checkpoint_note() == {"job": number, "modules": modules_now()}
        record.end(reason="complete", exit_code=0, steps={"first": 3, "last": 5})
        found = read(run, number)
        assert found["number"] == number
        assert found["steps"] == {"first": 3, "last": 5}
        assert found["modules"] == modules_now()
        assert found["git"]["root"] == str(my_module.parent)  # type: ignore[index]
        assert found["packages"]
        assert found["end"] is not None
    assert not list((run / "jobs").glob(".*"))


def test_a_job_that_was_killed_has_a_record_without_an_end(tmp_path: Path) -> None:
    record = JobRecord(tmp_path)
    record.begin({})
    assert record._gathering is not None
    record._gathering.join()
    found = read(tmp_path, 1)
    assert found["end"] is None
    assert found["reason"] == "running"
    assert found["packages"]


def test_nothing_that_goes_wrong_is_more_than_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "jobs").touch()  # in the way of the folder
    record = JobRecord(tmp_path)
    record.begin({})
    record.note_modules()
    assert record.modules() is not None  # a checkpoint has them all the same
    record.end(reason="complete")
    assert "this job leaves no record" in caplog.text
    (tmp_path / "jobs").unlink()

    def broken(environ: object) -> str:
        raise ZeroDivisionError("unheard of")

    monkeypatch.setattr(job_record, "image", broken)
    record = JobRecord(tmp_path)
    record.begin({"run": "x"})
    record.end(reason="complete")
    assert "the record of this job is not complete: unheard of" in caplog.text
    assert read(tmp_path, 1)["reason"] == "complete"
    assert "git" in read(tmp_path, 1)  # the rest is there


def test_a_limit_of_threads_ends_no_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refused(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refused)
    record = JobRecord(tmp_path)
    record.begin({})
    record.note_modules()
    assert record.checkpoint_note() == {"job": 1, "modules": None}
    record.end(reason="complete")
    assert "not complete: can't start new thread" in caplog.text


def test_no_job_waits_for_what_hangs(
    my_module: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_record, "_PATIENCE_SECONDS", 0.1)
    hung = threading.Event()

    def hanging(*_: object) -> None:
        hung.wait()

    monkeypatch.setattr(job_record, "repository_at", hanging)
    monkeypatch.setattr(job_record, "modules_now", hanging)
    record = JobRecord(tmp_path)
    try:
        record.begin({})
        record.note_modules()
        assert record.modules() is None
        record.end(reason="complete")  # returns
        assert read(tmp_path, 1)["reason"] == "complete"
    finally:
        hung.set()
