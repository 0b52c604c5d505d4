"""Ranks, GPUs and CPUs of a node follow from each other; a chain acts once on what is for once."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpctrain.batch.exit_status import Outcome, read_outcome, write_outcome
from hpctrain.batch.job_plan import Geometry, geometry
from hpctrain.batch.sites import find_site
from hpctrain.checkpoint.lease import Lease
from hpctrain.errors import ConfigError, UsageError
from hpctrain.training.rank_zero import RunFolder


@pytest.mark.parametrize(
    ("site", "ranks", "cpus", "gpus", "expected"),
    [
        ("", None, None, None, (4, 8, 4)),
        ("", None, None, 8, (8, 8, 8)),
        ("", 2, None, None, (2, 8, 2)),
        ("", 2, 16, 4, (2, 16, 4)),
        ("", None, None, 0, (4, 8, 0)),
        ("", 32, 1, 0, (32, 1, 0)),
        ("perlmutter", None, None, 2, (2, 64, 2)),
        ("perlmutter", 1, None, None, (1, 128, 1)),
        ("perlmutter", 128, 1, 0, (128, 1, 0)),
        ("frontier", None, None, None, (8, 7, None)),
        ("frontier", 4, None, None, (4, 14, None)),
        ("della", 1, None, None, (1, 16, None)),
    ],
)
def test_the_rest_follows(
    site: str,
    ranks: int | None,
    cpus: int | None,
    gpus: int | None,
    expected: tuple[int, int, int | None],
) -> None:
    found = geometry(find_site(site) if site else None, ranks=ranks, cpus_per_rank=cpus, gpus=gpus)
    assert found == Geometry(ranks=expected[0], cpus_per_rank=expected[1], gpus=expected[2])


@pytest.mark.parametrize(
    ("site", "ranks", "cpus", "gpus", "words"),
    [
        ("", 8, None, 4, "a GPU carries one rank"),
        ("perlmutter", 8, None, None, "has 4 GPUs"),
        ("perlmutter", None, None, 8, "has 4 GPUs"),
        ("perlmutter", 4, 64, None, "256 CPUs a node: perlmutter has 128"),
        ("frontier", None, None, 8, "asks for its GPUs by itself"),
        ("lumi", 4, None, None, "bound to 8 ranks"),
        ("aurora", 6, None, None, "bound to 12 ranks"),
    ],
)
def test_what_contradicts_is_refused(
    site: str, ranks: int | None, cpus: int | None, gpus: int | None, words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        geometry(find_site(site) if site else None, ranks=ranks, cpus_per_rank=cpus, gpus=gpus)


def begin(run: Path, wanted: str = "never", step: int = 0) -> str:
    """Begin a job of a run and leave it; return what `checkpoint.resume` was for it."""
    with RunFolder(run) as folder:
        found = folder.resume(wanted)
        folder.begin(step)
    return found


def test_only_the_first_of_a_chain_begins_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A script that submitted itself again undid its own job."""
    monkeypatch.setenv("HPCTRAIN_TOKEN", "slurm-7")
    told = []
    for attempt in ("1", "2", "3"):
        monkeypatch.setenv("HPCTRAIN_ATTEMPT", attempt)
        told.append(begin(tmp_path))
    assert told == ["never", "auto", "auto"]
    assert begin(tmp_path, "runs/a/checkpoints/step-00000007") == "auto"
    # Submitted by hand, the same script begins a chain of its own.
    monkeypatch.setenv("HPCTRAIN_ATTEMPT", "1")
    assert begin(tmp_path) == "never"
    # One whose first job has not come as far as this folder has not acted yet.
    monkeypatch.setenv("HPCTRAIN_TOKEN", "slurm-8")
    monkeypatch.setenv("HPCTRAIN_ATTEMPT", "2")
    assert begin(tmp_path) == "never"
    outcome = read_outcome(tmp_path)
    assert outcome is not None
    assert outcome.token == "slurm-8"


def test_a_chain_that_counts_no_jobs_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HPCTRAIN_TOKEN", "HPCTRAIN_ATTEMPT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    assert begin(tmp_path) == "never"
    for code, refused in ((75, True), (None, True), (0, False), (70, False)):
        before = Outcome(code=code, reason="x", step=3, tries=1, job="slurm 7.0")
        write_outcome(tmp_path, before)
        if refused:
            with pytest.raises(ConfigError, match="would undo it"):
                begin(tmp_path)
        else:
            assert begin(tmp_path) == "never"
        write_outcome(tmp_path, before)
        assert begin(tmp_path, "auto") == "auto"
    monkeypatch.delenv("SLURM_JOB_ID")
    write_outcome(tmp_path, Outcome(code=75, reason="x", step=3, tries=1, job="slurm 7.0"))
    assert begin(tmp_path) == "never"  # a person decides


def test_the_next_of_a_chain_takes_the_lease_over(tmp_path: Path) -> None:
    def job(attempt: int) -> dict[str, str]:
        return {"HPCTRAIN_TOKEN": "lsf-7", "HPCTRAIN_ATTEMPT": str(attempt)}

    with Lease(tmp_path, job(1)):
        path = tmp_path / "lease.json"
        path.write_text(path.read_text().replace('"host": "', '"host": "not-'))
        with Lease(tmp_path, job(2)) as lease:
            lease.confirm()
