"""Which mpirun belongs to an MPI library."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from hpctrain.errors import LaunchError
from hpctrain.launch.start_ranks import _find, _of_the_batch_system

SAYS = {
    "openmpi": "mpirun (Open MPI) 5.0.11",
    "intel": "Intel(R) MPI Library for Linux* OS, Version 2021.19 Build 1",
    "mpich": "HYDRA build details:\\n    Version: 5.0.2",
}


def install(path: Path, family: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\nprintf '{SAYS[family]}\\n'\n", encoding="utf-8")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.mark.parametrize(
    ("version", "library", "installed", "expected"),
    [
        # beside the library, at the depth of each way to install one
        ("MPICH 5.0.2", "lib/libmpi.so.12", {"bin/mpirun": "mpich"}, "bin/mpirun"),
        ("Open MPI v5", "a/lib/libmpi.so.40", {"a/bin/mpirun": "openmpi"}, "a/bin/mpirun"),
        ("Intel(R) MPI 2021", "lib/release/libmpi.so", {"bin/mpirun": "intel"}, "bin/mpirun"),
        (
            "Open MPI v4.1.4",
            "usr/lib/x86_64-linux-gnu/openmpi/lib/libmpi.so.40",
            {"usr/bin/mpirun": "mpich", "usr/bin/mpirun.openmpi": "openmpi"},
            "usr/bin/mpirun.openmpi",
        ),
        # the nearest, and of its own family
        ("MPICH 4", "a/lib/l.so", {"a/bin/mpirun": "mpich", "bin/mpirun": "mpich"}, "a/bin/mpirun"),
        ("MPICH 4", "a/lib/l.so", {"a/bin/mpirun": "openmpi", "bin/mpirun": "mpich"}, "bin/mpirun"),
        # on PATH; Intel's and MPICH's serve each other's ranks
        ("MPICH 4.2", "", {"path/mpirun": "intel"}, "path/mpirun"),
        ("Intel(R) MPI 2021", "", {"path/mpirun": "mpich"}, "path/mpirun"),
        ("Open MPI v5", "", {"path/mpirun": "mpich"}, None),
        ("CRAY MPICH version 8", "lib/libmpi_cray.so", {"path/mpirun": "mpich"}, None),
        ("Some MPI 1.0", "lib/libmpi.so", {"bin/mpirun": "mpich"}, None),
    ],
)
def test_the_mpirun_of_a_library(
    version: str,
    library: str,
    installed: dict[str, str],
    expected: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    root = tmp_path / "one" / "two" / "three"  # so that no folder above has a bin of its own
    for name, family in installed.items():
        install(root / name, family)
    monkeypatch.setenv("PATH", str(root / "path"))
    file = str(root / library) if library else ""
    if expected is not None:
        assert _find(version, file)[0] == root / expected
        return
    with pytest.raises(LaunchError, match="no mpirun of it is") as caught:
        _find(version, file)
    assert "hpctrain[mpich]" in str(caught.value)


@pytest.mark.parametrize(
    ("version", "env", "programs", "expected"),
    [
        (
            "CRAY MPICH version 8",
            {"SLURM_JOB_ID": "1", "SLURMD_NODENAME": "n7"},
            {"srun": "MPI plugin types are...\\n\\tcray_shasta\\n\\tpmi2\\n\\tnone"},
            ["srun", "--overlap", "--ntasks=3", "--nodelist=n7", "--mpi=cray_shasta"],
        ),
        ("MPICH 4", {"SLURM_JOB_ID": "1"}, {"srun": "pmi2 none pmix"}, ["srun", "--mpi=pmi2"]),
        ("Open MPI v5", {"SLURM_JOB_ID": "1"}, {"srun": "pmi2 none pmix"}, ["srun", "--mpi=pmix"]),
        ("Open MPI v5", {"SLURM_JOB_ID": "1"}, {"srun": "none"}, ["srun", "--overlap"]),
        ("CRAY MPICH version 8", {"PBS_JOBID": "1"}, {"mpiexec": "PALS 1.2"}, ["mpiexec", "-n"]),
        ("CRAY MPICH version 8", {"PBS_JOBID": "1"}, {"mpiexec": SAYS["openmpi"]}, None),
        ("CRAY MPICH version 8", {"PBS_JOBID": "1"}, {}, None),
        ("CRAY MPICH version 8", {}, {"srun": "cray_shasta", "mpiexec": "PALS"}, None),
    ],
)
def test_what_the_batch_system_has(
    version: str,
    env: dict[str, str],
    programs: dict[str, str],
    expected: list[str] | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, text in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\nprintf '{text}\\n' >&2\n", encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    for name in ("SLURM_JOB_ID", "SLURMD_NODENAME", "SLURM_MPI_TYPE", "PBS_JOBID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {**env, "PATH": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    found = _of_the_batch_system(3, version)
    if expected is None:
        assert found is None
        return
    assert found is not None
    assert found[0] == str(tmp_path / expected[0])
    assert set(expected[1:]) <= set(found)
    assert ("--mpi" in " ".join(found)) == ("--mpi" in " ".join(expected))
