"""Sweeps: points and their numbers, the scripts of job arrays, and what is submitted again."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from helpers.flux import write_flux
from helpers.limits import JOB_SECONDS

from hpctrain.batch.exit_status import Outcome, write_outcome
from hpctrain.batch.scheduler import live_jobs
from hpctrain.batch.sweep import asked_points, read_sweep
from hpctrain.cli import main
from hpctrain.errors import UsageError

ROOT = Path(__file__).parents[3]
SWEEP = ["--sweep", "optimizer.lr=1e-3,3e-4", "--sweep", "run.seed=1,2,3"]
THROTTLED = {name: [*SWEEP, "--throttle", "2"] for name in ("slurm", "lsf", "pbs")}
THROTTLED["flux"] = SWEEP  # it has no arrays
ASKED = ["--nodes", "2", "--ranks-per-node", "2", "--time", "2:00:00", "--output", "job.sh"]
SCHEDULERS = tuple(THROTTLED)
HOSTILE = """task.inputs=['a`b'],["$(touch pwned) 'x"]"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "configs").mkdir()
    shutil.copy(ROOT / "configs" / "run.toml", tmp_path / "configs" / "run.toml")
    for part in ("train", "validation"):
        (tmp_path / "data" / "digits" / part).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bin").mkdir()
    write_flux(tmp_path / "bin")
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    monkeypatch.delenv("HPCTRAIN_CHECK", raising=False)
    return tmp_path


def job(*arguments: str, code: int = 0) -> None:
    assert main(["job", "configs/run.toml", *arguments]) == code


def command(here: Path, name: str, body: str) -> None:
    (here / "bin" / name).write_text(f"#!/bin/bash\n{body}\n", encoding="utf-8")
    (here / "bin" / name).chmod(0o755)


@pytest.mark.parametrize(
    ("axes", "points"),
    [
        (
            ["optimizer.lr=1e-3,3e-4"],
            [("optimizer.lr=0.001",), ("optimizer.lr=0.0003",)],
        ),
        (
            ["optimizer.betas=[0.9, 0.95],[0.9, 0.99]", "training.compile=true"],
            [
                ("optimizer.betas=[0.9, 0.95]", "training.compile=true"),
                ("optimizer.betas=[0.9, 0.99]", "training.compile=true"),
            ],
        ),
        (
            ['optimizer.use=adamw,"sgd", my.code:Opt'],
            [
                ('optimizer.use="adamw"',),
                ('optimizer.use="sgd"',),
                ('optimizer.use="my.code:Opt"',),
            ],
        ),
        (
            ['data.train="a,b",\'c"d\'', "model.x={a = 1, b = 2}"],
            [
                ('data.train="a,b"', 'model.x={"a" = 1, "b" = 2}'),
                ('data.train="c\\"d"', 'model.x={"a" = 1, "b" = 2}'),
            ],
        ),
    ],
)
def test_values_are_those_of_toml(axes: list[str], points: list[tuple[str, ...]]) -> None:
    assert asked_points(axes, None) == points


@pytest.mark.parametrize(
    ("axes", "words"),
    [
        (["lr=1,2"], "expected SECTION.KEY=VALUE,VALUE"),
        (["optimizer.lr"], "expected SECTION.KEY=VALUE,VALUE"),
        (["optimizer.lr=1,,2"], "no value"),
        (["optimizer.lr=1,1"], "1 is given twice"),
        (["optimizer.lr=0.001,1e-3"], "0.001 is given twice"),
        (["optimizer.betas=[1,2"], "not a TOML value"),
        (["optimizer.lr=1,2", "optimizer.lr=3"], "given twice"),
        (["run.name=a,b"], "cannot be swept"),
        (["job.nodes=1,2"], "cannot be swept"),
        (["a.b=1,2,3,4,5,6,7,8,9,10", *(f"a.c{n}=1,2,3,4,5,6" for n in range(5))], "77,760 points"),
    ],
)
def test_slips_of_the_pen(axes: list[str], words: str) -> None:
    with pytest.raises(UsageError, match=re.escape(words)):
        asked_points(axes, None)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--sweep", "optimizr.lr=1,2"], 78, "did you mean optimizer?"),
        (["--sweep", "training.max_epoch=1,2"], 78, "did you mean training.max_epochs?"),
        (["--sweep", "optimizer.lr=1e-3,much"], 78, 'optimizer.lr = "much"'),
        (["--sweep", "optimizer.lr=1,1.0"], 78, "are the same run"),
        (["--sweep", "optimizer.wieght_decay=0.1"], 78, "did you mean"),
        (["--sweep", "run.seed=1,2", "run.seed=3"], 64, "run.seed is swept, and set beside it"),
        (["--sweep", "run.seed=1,2", "--pack", "3"], 64, "cannot be shared out"),
        (["--pack", "2"], 64, "--pack is for the points of a --sweep"),
        (["--sweep", "data.lanes=2,64"], 78, "data.lanes = 2 is the most that can train"),
        (["--sweep", "run.seed=1,2", "--max-node-hours", "7"], 78, "each element, may take 8"),
        (["--sweep-file", "no.toml"], 78, "no.toml: cannot be read: No such file"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_is_written(
    here: Path, arguments: list[str], code: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    job(*arguments, *ASKED, "--scheduler", "slurm", code=code)
    assert words in capsys.readouterr().err
    assert not (here / "runs").exists()
    assert not (here / "job.sh").exists()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "points.toml",
            '[[points]]\noptimizer.lr = 1e-3\nmodel.use = "mlp"\n[[points]]\nrun.seed = 2',
        ),
        ("points.csv", "optimizer.lr, model.use, run.seed\n1e-3, mlp,\n\n,, 2\n"),
    ],
)
def test_a_list_of_points(here: Path, name: str, text: str) -> None:
    (here / name).write_text(text, encoding="utf-8")
    assert asked_points(["training.clip_norm=1.0,2.0"], here / name) == [
        ("optimizer.lr=0.001", 'model.use="mlp"', "training.clip_norm=1.0"),
        ("optimizer.lr=0.001", 'model.use="mlp"', "training.clip_norm=2.0"),
        ("run.seed=2", "training.clip_norm=1.0"),
        ("run.seed=2", "training.clip_norm=2.0"),
    ]


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--pack", "2", "--chain", "2"],
        ["--pack", "2", "--max-node-hours", "1000", "run.directory=it's $(here)"],
        ["--sweep", HOSTILE, "run.name=other"],
    ],
    ids=["plain", "chain", "pack", "hostile"],
)
def test_scripts_are_sound(here: Path, scheduler: str, options: list[str]) -> None:
    job("--scheduler", scheduler, *THROTTLED[scheduler], *options, *ASKED, "--gpus-per-node", "0")
    checked = [["bash", "-n", "job.sh"]]
    if shutil.which("shellcheck"):
        checked.append(["shellcheck", "job.sh"])
    for each in checked:
        result = subprocess.run(each, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stdout + result.stderr


ELEMENTS: dict[str, tuple[str, dict[str, str]]] = {
    "slurm": ("srun", {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "4"}),
    "lsf": ("mpirun", {"LSB_JOBID": "7", "LSB_JOBINDEX": "5", "LSB_MCPU_HOSTS": "n1 2 n2 2"}),
    "pbs": ("mpiexec", {"PBS_JOBID": "7[4].head", "PBS_ARRAY_INDEX": "4"}),
    "flux": ("flux-run", {"FLUX_ENCLOSING_ID": "ƒ7", "HPCTRAIN_POINT": "4"}),
}
COMMON = {"SLURM_CPUS_PER_TASK": "1", "LSB_DJOB_NUMPROC": "4"}
SAYS = 'printf "<%s>" "$@" >>called; echo >>called; exit 75'


def run_script(here: Path, variables: dict[str, str]) -> subprocess.CompletedProcess[str]:
    (here / "nodes").write_text("n1\nn1\nn2\nn2\n", encoding="utf-8")
    own = {"PBS_NODEFILE": str(here / "nodes"), "PBS_O_WORKDIR": str(here)}
    return subprocess.run(
        ["bash", "job.sh"],
        env={"PATH": os.environ["PATH"], **COMMON, **own, **variables},
        capture_output=True,
        text=True,
        check=False,
        timeout=JOB_SECONDS,
    )


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_an_element_trains_its_point(here: Path, scheduler: str) -> None:
    """And is submitted again by itself alone."""
    launcher, variables = ELEMENTS[scheduler]
    job("--scheduler", scheduler, *THROTTLED[scheduler], *ASKED)
    command(here, launcher, SAYS)
    command(here, "python", 'echo "$*" >>asked; exit 75')
    command(here, "scontrol", 'echo "$*" >>again')
    for name in ("bsub", "qsub", "flux-batch"):
        command(here, name, 'echo "$*" >>again; echo 8')
    result = run_script(here, variables)
    assert result.returncode == 75, result.stderr
    called = Path("called").read_text(encoding="utf-8")
    point = "<configs/run.toml><optimizer.lr=0.0003><run.seed=2>"
    assert f'{point}<run.directory="runs"' not in called
    assert f'{point}<run.directory="runs/digits"><run.name="004">' in called
    assert "status runs/digits/004 --exit-code" in Path("asked").read_text(encoding="utf-8")
    again = Path("again").read_text(encoding="utf-8").strip()
    assert (
        again
        == {
            "slurm": "requeue 7_4",
            "lsf": "-J digits[5]",
            "pbs": "-v HPCTRAIN_TOKEN=pbs-7[4].head,HPCTRAIN_ATTEMPT=2,HPCTRAIN_POINT=4 job.sh",
            "flux": "--dependency=afterany:f7 --env=HPCTRAIN_POINT=4 job.sh",
        }[scheduler]
    )
    index = ("INDEX", "TASK_ID", "POINT")
    none = run_script(here, {name: "" for name in variables if name.endswith(index)})
    assert none.returncode == 64
    assert "not an element of the sweep's job array" in none.stderr


@pytest.mark.parametrize("scheduler", ["lsf", "pbs", "flux"])
def test_points_side_by_side_have_hosts_of_their_own(here: Path, scheduler: str) -> None:
    """The second of three groups; its second point is complete already."""
    launcher, variables = ELEMENTS[scheduler]
    changed = {"LSB_JOBINDEX": "2", "PBS_ARRAY_INDEX": "1", "HPCTRAIN_POINT": "1"}
    job(
        "--scheduler",
        scheduler,
        *THROTTLED[scheduler],
        "--pack",
        "2",
        *ASKED,
        "--gpus-per-node",
        "0",
    )
    command(here, launcher, SAYS)
    command(here, "python", 'echo "$*" >>asked; [[ $* == *003* ]] || exit 70')
    command(here, "bsub", "exit 1")
    for number in ("002", "003"):
        leave(here, number, 0)
    (here / "runs" / "digits" / "002" / "exit.json").unlink()
    result = run_script(here, variables | changed)
    called = Path("called").read_text(encoding="utf-8").splitlines()
    assert len(called) == 1
    alone = "<--exclusive><--nodes=1>" if scheduler == "flux" else "hosts><n1>"
    assert alone in called[0]
    assert '<run.name="002">' in called[0]
    assert (
        "1 of 2 points complete; failed or given up: 002 (code 70). Exit code 70" in result.stdout
    )
    assert result.returncode == 70


def leave(here: Path, number: str, code: int | None, job: str | None = None) -> None:
    run = here / "runs" / "digits" / number
    run.mkdir(parents=True, exist_ok=True)
    write_outcome(run, Outcome(code=code, reason="", step=1, tries=1, job=job))


QSTAT = {
    "Jobs": {
        "41[5].head": {"resources_used": {"cput": "1"}, "job_state": "Q"},
        "41[3].head": {"job_state": "X"},
    }
}
"""As OpenPBS has it, less what is not looked at."""

SUBMITTED: dict[str, dict[str, Any]] = {
    "slurm": {
        "command": ("sbatch", "echo 41"),
        "ask": ("squeue", "[[ $* == *41* ]] && echo 41_5; exit 0"),
        "first": ["--parsable --array=0-5%2 job.sh"],
        "second": ["--parsable --array=1,3-4%2 job.sh"],
        "job": "41_3",
    },
    "lsf": {
        "command": ("bsub", "cat >/dev/null; echo 'Job <41> is submitted to default queue <q>.'"),
        "ask": ("bjobs", "[[ $* == *41* ]] && printf '41^6^RUN\\n41^4^EXIT\\n'; exit 0"),
        "first": ["-J digits[1-6]%2"],
        "second": ["-J digits[2,4-5]%2"],
        "job": "41[4]",
    },
    "pbs": {
        "command": ("qsub", "[[ $* == *-J* ]] && echo '41[].head' || echo 42.head"),
        "ask": (
            "qstat",
            f"[[ $* == *41* ]] && echo '{json.dumps(QSTAT)}'; exit 0",
        ),
        "first": ["-J 0-5%2 job.sh"],
        "second": ["-v HPCTRAIN_POINT=1 job.sh", "-J 3-4%2 job.sh"],
        "job": "41[3].head",
    },
    "flux": {
        "command": ("flux-batch", "echo ƒ4$(wc -l <calls)"),
        "ask": ("flux-jobs", "[[ $* == *f46* ]] && echo 'ƒ46 SCHED'; echo 'f44 INACTIVE'"),
        "first": [f"--env=HPCTRAIN_POINT={number} job.sh" for number in range(6)],
        "second": [f"--env=HPCTRAIN_POINT={number} job.sh" for number in (1, 3, 4)],
        "job": "f44",
    },
}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_what_is_incomplete_is_submitted_again(
    here: Path, scheduler: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Under the indices that it had; by commands that print what the real ones print."""
    known = SUBMITTED[scheduler]
    name, body = known["command"]
    command(here, name, f'echo "$*" >>calls; {body}')
    command(here, *known["ask"])
    asked = ["--scheduler", scheduler, *THROTTLED[scheduler], *ASKED, "--submit"]
    job(*asked)
    assert Path("calls").read_text(encoding="utf-8").splitlines() == known["first"]
    Path("calls").unlink()
    leave(here, "000", 0)
    leave(here, "002", 0)
    leave(here, "003", None, f"{scheduler} {known['job']}.0")
    leave(here, "004", 70)
    capsys.readouterr()
    job(*asked)
    assert Path("calls").read_text(encoding="utf-8").splitlines() == known["second"]
    told = capsys.readouterr().err
    assert "6 points: 2 complete, 1 waiting or running, 3 to submit (001, 003, 004)" in told
    before = read_sweep(here / "runs" / "digits")
    job(*[word.replace("1e-3,3e-4", "1e-2,1e-3") for word in asked])
    after = read_sweep(here / "runs" / "digits")
    assert before is not None
    assert after is not None
    assert [point.overrides for point in after.points[:6]] == [
        point.overrides for point in before.points
    ]
    assert [point.overrides[0] for point in after.points[6:]] == ["optimizer.lr=0.01"] * 3


def test_schedulers_that_do_not_answer(here: Path) -> None:
    for name, answer in {
        "squeue": "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1",
        "bjobs": "echo 'Job <7> is not found' >&2; exit 255",
        "qstat": "echo 'qstat: 7.head Job has finished, use -x' >&2; exit 35",
        "flux-jobs": "echo 'JobID f7 unknown' >&2; exit 1",
    }.items():
        command(here, name, answer)
    ids = {"slurm": "7_1", "lsf": "7[1]", "pbs": "7[1].head", "flux": "f7"}
    for scheduler, gone in ids.items():
        assert live_jobs(scheduler, [gone], os.environ) == set()
    for name in ("squeue", "bjobs", "qstat", "flux-jobs"):
        command(here, name, "echo busy >&2; exit 1")
    for scheduler in SCHEDULERS:
        assert live_jobs(scheduler, ["7"], os.environ) is None


def test_a_damaged_sweep_and_a_run_in_its_place(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--scheduler", "slurm", *SWEEP, *ASKED]
    job(*asked)
    assert main(["status", "runs/digits"]) == 78
    assert "whose points `python -m hpctrain runs runs/digits` lists" in capsys.readouterr().err
    path = here / "runs" / "digits" / "sweep.json"
    for damage in ("", "[]", "{}", '{"command": [], "points": [{}]}', '{"points": 3}'):
        path.write_text(damage, encoding="utf-8")
        job(*asked, code=78)
        assert f"{path.relative_to(here)} cannot be read" in capsys.readouterr().err
    path.write_text(json.dumps({"command": ["other.toml"], "points": []}), encoding="utf-8")
    job(*asked, code=78)
    assert "is a sweep of other.toml" in capsys.readouterr().err
    path.unlink()
    write_outcome(path.parent, Outcome(code=0, reason="", step=1, tries=1))
    job(*asked, code=78)
    assert "runs/digits holds a run" in capsys.readouterr().err
