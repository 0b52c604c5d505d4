"""Job scripts: what the command prints is what lies in jobs/, and what it refuses."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import subprocess
from pathlib import Path

import pytest
from helpers.limits import JOB_SECONDS
from helpers.waiting import wait_for

from hpctrain.batch.job_plan import parse_time
from hpctrain.batch.sites import built_in_sites, longest_hours
from hpctrain.batch.submission import submit
from hpctrain.cli import main
from hpctrain.errors import LaunchError, UsageError

ROOT = Path(__file__).parents[3]
SITES = tuple(built_in_sites())
GENERIC = ("slurm", "lsf", "pbs", "flux")
SHIPPED = {f"jobs/{name}.sh": ["--scheduler", name] for name in GENERIC} | {
    f"jobs/sites/{site.name}.sh": ["--site", site.name] for site in SITES
}
ASKED = ["--nodes", "2", "--time", "2:00:00"]
FEWEST = {
    f"jobs/sites/{site.name}.sh": site.queues[0].fewest_nodes for site in SITES if site.queues
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "configs").mkdir()
    shutil.copy(ROOT / "configs" / "run.toml", tmp_path / "configs" / "run.toml")
    for part in ("train", "validation"):
        (tmp_path / "data" / "digits" / part).mkdir(parents=True)
    for environment in ("my image.sif", "env.tar.gz", "env.zip"):
        (tmp_path / environment).touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def job(*arguments: str) -> int:
    return main(["job", "configs/run.toml", *arguments])


def assert_is_sound(script: str) -> None:
    checked = [["bash", "-n", script]]
    if shutil.which("shellcheck"):
        checked.append(["shellcheck", script])
    for command in checked:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("path", SHIPPED)
def test_the_scripts_in_jobs_are_what_is_printed(here: Path, path: str) -> None:
    nodes = str(max(2, FEWEST.get(path, 1)))
    command = [*SHIPPED[path], *ASKED, "--nodes", nodes, "--output", path]
    (here / path).parent.mkdir(parents=True)
    assert job(*command) == 0
    printed = (here / path).read_text(encoding="utf-8")
    assert printed == (ROOT / path).read_text(encoding="utf-8"), (
        f"write it anew: python -m hpctrain job configs/run.toml {' '.join(command)}"
    )
    assert (here / path).stat().st_mode & stat.S_IXUSR


@pytest.mark.parametrize(
    ("site", "environment", "loaded", "expected"),
    [
        ("frontier", [], "craype", ["load rocm", "load rccl-net-plugin"]),
        ("frontier", [], "craype:rocm/7.1.1", ["load rccl-net-plugin"]),
        ("frontier", ["--environment", "my image.sif"], "", []),
        (
            "lumi",
            ["--environment", "my image.sif"],
            "",
            ["use /appl/local/laifs/modules", "load lumi-aif-singularity-bindings"],
        ),
        ("lumi", [], "", []),
    ],
)
def test_modules_that_bring_the_plug_in(
    here: Path, site: str, environment: list[str], loaded: str, expected: list[str]
) -> None:
    """They are loaded before Python is looked for; sites' functions read what is not set."""
    assert job("--site", site, *ASKED, *environment, "--output", "job.sh") == 0
    assert_is_sound("job.sh")
    script = Path("job.sh").read_text(encoding="utf-8")
    before_python = script[: script.index("\npython=")]
    modules = 'module() { [[ $NOT_SET ]]; echo "module $*"; }\n'
    result = subprocess.run(
        ["bash", "-c", modules + before_python + "\necho at the end $-"],
        env={"PATH": os.environ["PATH"], "LOADEDMODULES": loaded},
        capture_output=True,
        text=True,
        check=True,
    )
    *told, last = result.stdout.splitlines()
    assert told == [f"module {each}" for each in expected]
    assert "u" in last.split()[-1]  # again


@pytest.mark.parametrize(
    ("scheduler", "element", "number"),
    [
        ("slurm", "SLURM_ARRAY_TASK_ID", "0"),
        ("lsf", "LSB_JOBINDEX", "1"),
        ("pbs", "PBS_ARRAY_INDEX", "0"),
    ],
)
def test_a_script_of_one_run_is_no_job_array(
    here: Path, scheduler: str, element: str, number: str
) -> None:
    """`sbatch --array` of it would have each element continue, and submit again, the same run."""
    assert job("--scheduler", scheduler, *ASKED, "--output", "job.sh") == 0
    known = {"SLURM_CPUS_PER_TASK": "1", "PBS_NODEFILE": "nodes", "PBS_O_WORKDIR": str(here)}
    environment = {"PATH": os.environ["PATH"], **known, element: number}
    ended = subprocess.run(
        ["bash", "job.sh"], env=environment, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 64
    assert f"error: {element}={number}: an array, and this script trains one run" in ended.stderr
    assert "--sweep" in ended.stderr


def test_nothing_else_is_in_jobs_sites() -> None:
    assert {f"jobs/sites/{path.name}" for path in (ROOT / "jobs" / "sites").iterdir()} == {
        path for path in SHIPPED if path.startswith("jobs/sites/")
    }


@pytest.mark.parametrize("name", GENERIC)
@pytest.mark.parametrize(
    "options",
    [
        ["--chain", "3", "--environment", "my image.sif"],
        ["--environment", "env.tar.gz", "--gpus-per-node", "0", "--queue", "short"],
        ["run.name=other", "run.directory=my runs", "--account", "me"],
    ],
    ids=["chain", "packed", "names"],
)
def test_other_scripts_are_sound(
    here: Path, name: str, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert job("--scheduler", name, *ASKED, *options) == 0
    text = capsys.readouterr().out
    Path("job.sh").write_text(text, encoding="utf-8")
    assert_is_sound("job.sh")
    if "--chain" in options:
        assert "'my image.sif'" in text
        assert "-z $ended" not in text
    elif "--account" in options:
        assert "'my runs/other'" in text
        assert "EDIT" not in text
    else:
        assert "short" in text
        assert "gpu" not in text.lower()


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("slurm", "#SBATCH --ntasks-per-node=8"),
        ("pbs", "#PBS -l select=2:ncpus=64:mpiprocs=8:ngpus=8"),
        ("lsf", '#BSUB -R "span[ptile=8] affinity[core(8)]"'),
        ("flux", "#flux: --gpus-per-slot=8"),
    ],
)
def test_eight_gpus_are_eight_ranks(
    here: Path, name: str, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """There were 4 tasks, below the words "one rank a GPU"."""
    assert job("--scheduler", name, *ASKED, "--gpus-per-node", "8") == 0
    assert line in capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("2:00:00", 7200), ("0:01:00", 60), ("1-12:00:00", 129600), ("48:00:00", 172800)],
)
def test_times(text: str, seconds: int) -> None:
    assert parse_time(text) == seconds


@pytest.mark.parametrize("text", ["", "2:00", "120", "0:00:00", "1:60:00", "2h"])
def test_times_that_schedulers_read_differently(text: str) -> None:
    with pytest.raises(UsageError, match="--time"):
        parse_time(text)


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--scheduler", "slurm", "--nodes", "32"], 78, ["data.lanes = 64", "take 16 nodes"]),
        (["--scheduler", "slurm", "--nodes", "32", "data.shuffle=false"], 0, []),
        (["--site", "frontier", "--nodes", "4", "--time", "2:00:01"], 78, ["allows 2 h"]),
        (["--site", "frontier", "--nodes", "9999", "data.lanes=100000"], 78, ["at most 9472"]),
        (["--site", "polaris", "--nodes", "4", "--time", "1:00:00"], 78, ["begins at 10"]),
        (["--site", "frontier", "--nodes", "4", "--time", "3:00:00", "--queue", "x"], 0, []),
        (["--scheduler", "slurm", "--time", "0:00:09"], 78, ["no step could be trained"]),
        (["--scheduler", "lsf", "--time", "0:00:40"], 78, ["whole minutes"]),
        (["--site", "frontir"], 64, ["did you mean frontier?", "known are aurora, clariden"]),
        (["--site", "frontier", "--scheduler", "pbs"], 64, ["frontier runs slurm"]),
        ([], 64, ["--scheduler is needed"]),
        (["--scheduler", "slurm", "--nodes", "0"], 64, ["0 is not 1 or more"]),
        (["--scheduler", "slurm", "optimizer.lr=fast"], 78, ["optimizer.lr"]),
        (["--scheduler", "pbs", "--gpus-per-node", "-1"], 64, ["-1 is not 0 or more"]),
        (["--scheduler", "lsf", "--cpus-per-rank", "0"], 64, ["0 is not 1 or more"]),
        (["--scheduler", "slurm", "--environment", "gone.sif"], 64, ["gone.sif: no such file"]),
        (["--scheduler", "slurm", "--environment", "env.zip"], 64, [".sif, .tar, .tar.gz, .tgz"]),
        (["--scheduler", "slurm", "--environment", "data"], 64, ["neither an image nor"]),
        (
            ["--scheduler", "lsf", "--ranks-per-node", "8", "--gpus-per-node", "4"],
            64,
            ["a GPU carries one rank"],
        ),
    ],
)
def test_what_cannot_run_is_refused(
    here: Path, options: list[str], code: int, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    defaults = {"--nodes": "2", "--time": "1:00:00"}
    missing = [
        part for key, value in defaults.items() if key not in options for part in (key, value)
    ]
    assert job(*missing, *options) == code
    error = capsys.readouterr().err
    for word in words:
        assert word in error


def test_a_walltime_shorter_than_a_measured_save(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = here / "runs" / "digits"
    run.mkdir(parents=True)
    content = {"code": 75, "reason": "x", "step": 7, "tries": 1, "save_seconds": 600}
    (run / "exit.json").write_text(json.dumps(content), encoding="utf-8")
    assert job("--scheduler", "slurm", "--nodes", "2", "--time", "0:30:00") == 78
    assert "a save of 600 s" in capsys.readouterr().err
    assert job("--scheduler", "slurm", *ASKED) == 0


def test_limits_of_sites() -> None:
    for queue in (queue for site in SITES for queue in site.queues):
        assert (longest_hours(queue, queue.fewest_nodes) is None) == (not queue.limits)


COMMANDS = {
    "slurm": (
        "sbatch",
        "echo 4$(wc -l <calls)",
        "--parsable --dependency=afterany:41 --export=ALL,VARIABLES job.sh",
    ),
    "lsf": (
        "bsub",
        "echo 'Job <'4$(wc -l <calls)'> is submitted to queue <normal>.'",
        "-w ended(41) -env all,VARIABLES",
    ),
    "pbs": ("qsub", "echo 4$(wc -l <calls).head", "-W depend=afterany:41.head -v VARIABLES job.sh"),
    "flux": (
        "flux",
        "echo ƒ4$(wc -l <calls)",
        "batch --dependency=afterany:f41 --env=VARIABLES job.sh",
    ),
}


@pytest.mark.parametrize("scheduler", COMMANDS)
def test_chains_are_submitted(
    tmp_path: Path, scheduler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a command that prints what the real one prints."""
    command, prints, second = COMMANDS[scheduler]
    shim = tmp_path / command
    shim.write_text(f'#!/bin/sh\necho "$*" >>calls\ncat >>stdin\n{prints}\n', encoding="utf-8")
    shim.chmod(0o755)
    (tmp_path / "job.sh").write_text("#!/bin/bash\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    prefix, suffix = "f" * (scheduler == "flux"), ".head" * (scheduler == "pbs")
    ids = submit(Path("job.sh"), scheduler, chain=3)
    assert ids == [f"{prefix}4{number}{suffix}" for number in (1, 2, 3)]
    calls = Path("calls").read_text(encoding="utf-8").splitlines()
    variables = r"HPCTRAIN_TOKEN=(chain-\w+)(?:,| --env=)HPCTRAIN_ATTEMPT=(\d)"
    told = [re.search(variables, call) for call in calls]
    assert [found[2] for found in told if found] == ["1", "2", "3"]
    assert len({found[1] for found in told if found}) == 1
    assert "afterany" not in calls[0]
    assert "ended" not in calls[0]
    assert told[1] is not None
    assert calls[1].replace(told[1][0], "VARIABLES") == second
    assert Path("stdin").read_text(encoding="utf-8") == "#!/bin/bash\n" * 3 * (scheduler == "lsf")
    shim.write_text("#!/bin/sh\necho no such account >&2; exit 1\n", encoding="utf-8")
    with pytest.raises(LaunchError, match="no such account"):
        submit(Path("job.sh"), scheduler)
    shim.unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LaunchError, match="No such file"):
        submit(Path("job.sh"), scheduler)


RANKS_ARE_DONE = {
    "mpirun": "exit 75",
    "python": "touch asking; until [[ -e answer ]]; do sleep 0.05; done; exit 75",
    "bsub": "touch submitted",
}


@pytest.mark.parametrize("is_cancelled", [False, True])
def test_a_job_that_is_cancelled_at_its_very_end_does_not_come_back(
    here: Path, monkeypatch: pytest.MonkeyPatch, is_cancelled: bool
) -> None:
    assert job("--scheduler", "lsf", *ASKED, "--output", "job.sh") == 0
    for name, body in RANKS_ARE_DONE.items():
        (here / name).write_text(f"#!/bin/bash\n{body}\n", encoding="utf-8")
        (here / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{here}:{os.environ['PATH']}")
    monkeypatch.setenv("LSB_DJOB_NUMPROC", "2")
    monkeypatch.delenv("HPCTRAIN_CHECK", raising=False)
    with subprocess.Popen(["bash", "job.sh"]) as script:
        wait_for((here / "asking").exists)
        if is_cancelled:
            script.terminate()  # bash heeds it once the command that it waits for has ended
        (here / "answer").touch()
        assert script.wait(timeout=JOB_SECONDS) == 75
    assert (here / "submitted").exists() != is_cancelled


READS_ALL = {
    "mpiexec": 'cat >/dev/null; [[ $* != *"-m hpctrain"* ]] || exit 75',
    "python": "cat >/dev/null; exit 75",
    "qsub": "touch submitted",
}


@pytest.mark.parametrize("options", [[], ["--environment", "env.tar.gz"]])
def test_launchers_do_not_read_the_rest_of_the_script(
    here: Path, monkeypatch: pytest.MonkeyPatch, options: list[str]
) -> None:
    """PBS may hand the script to its shell on stdin, which launchers pass on to rank 0."""
    assert job("--scheduler", "pbs", *ASKED, *options, "--output", "job.sh") == 0
    for name, body in READS_ALL.items():
        (here / name).write_text(f"#!/bin/bash\n{body}\n", encoding="utf-8")
        (here / name).chmod(0o755)
    (here / "nodes").write_text("n1\nn2\n", encoding="utf-8")
    monkeypatch.setenv("PATH", f"{here}:{os.environ['PATH']}")
    for variable, value in {
        "PBS_O_WORKDIR": str(here),
        "PBS_NODEFILE": str(here / "nodes"),
        "PBS_JOBID": "7.pbs",
    }.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.delenv("HPCTRAIN_CHECK", raising=False)
    with (here / "job.sh").open("rb") as script:
        ended = subprocess.run(["bash"], stdin=script, timeout=JOB_SECONDS, check=False)
    assert ended.returncode == 75
    assert (here / "submitted").exists()
