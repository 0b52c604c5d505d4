"""Sites of all makers, the [job] table, environments and the bound on what a run may take."""

from __future__ import annotations

import os
import pty
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.limits import JOB_SECONDS

from hpctrain.batch.exit_status import Outcome, ending, read_status, write_outcome
from hpctrain.batch.sites import built_in_sites, load_site, missing_sources, site_of_host
from hpctrain.cli import main
from hpctrain.errors import ConfigError

ROOT = Path(__file__).parents[3]
SITES = tuple(built_in_sites())
STRANGER = 65533
EVERYWHERE = [("--scheduler", name) for name in ("slurm", "lsf", "pbs", "flux")]
EVERYWHERE += [("--site", site.name) for site in SITES]
NASTY = "a 'b' \"c\" $(touch pwned) `touch pwned`; touch pwned & # --uid=0 \\ %x {{ job }} *é"

OURS = """\
name = "ours"
title = "Our cluster"
scheduler = "slurm"
ranks_per_node = 2
cpus_per_rank = 3
gpus_per_node = 2
queue_option = "--partition"

[[queues]]
name = "short"
limits = [{ nodes = 4, hours = 1 }, { nodes = 8, hours = 0.5 }]

[[directives]]
line = "--constraint=gpu"
reason = "The nodes with GPUs."
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    work = tmp_path / "work"
    for part in ("train", "validation"):
        (work / "data" / "digits" / part).mkdir(parents=True)
    shutil.copy(ROOT / "configs" / "run.toml", work / "run.toml")
    (work / "ours.toml").write_text(OURS, encoding="utf-8")
    for name in (f"venv {NASTY.replace('/', '')}", "venv"):
        (work / name / "bin").mkdir(parents=True)
        (work / name / "bin" / "activate").touch()
    for name in ("image.sif", f"{NASTY}.sif"):
        (work / name).touch()
    monkeypatch.chdir(work)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return work


def job(*arguments: str) -> int:
    return main(["job", "run.toml", *arguments])


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    """Return the lines of a script of two nodes and an hour."""
    capsys.readouterr()
    assert job("--nodes", "2", "--time", "1:00:00", *arguments) == 0
    return capsys.readouterr().out.splitlines()


def test_each_fact_of_a_built_in_site_has_its_source() -> None:
    for site in SITES:
        assert missing_sources(site) == []
    names = {site.name for site in SITES}
    assert {"clariden", "jupiter", "leonardo", "isambard-ai", "aurora", "summit"} <= names
    assert {site.scheduler for site in SITES} == {"slurm", "lsf", "pbs", "flux"}
    assert [site.name for site in SITES if site.retired] == ["summit"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (('"slurm"', '"slurmm"'), "line 3: scheduler: Input should be"),
        (("ranks_per_node = 2", "ranks_per_node = 0"), "line 4: ranks_per_node"),
        (('title = "Our cluster"\n', ""), "title: Field required"),
        (('name = "ours"', 'name = "o\\n#SBATCH --uid=0"'), "line 1: name"),
        (('"short"', '"short --uid=0"'), "queue 'short --uid=0'"),
        (("nodes = 4", "nodes = 9"), "are to ascend"),
        (('"--constraint=gpu"', '"--constraint=gpu\\ntouch x"'), "cannot stand in a job script"),
        (('"--constraint=gpu"', '"--x # y"'), "holds no #"),
        (('"--constraint=gpu"', '"--x={ranks_of_node}"'), "{ranks_of_node} is not one of"),
        (("gpus_per_node", "gpu_per_node"), "line 6: gpu_per_node: Unexpected"),
        (("[[queues]]", "[[queues"), "line 9"),
    ],
)
def test_a_site_file_that_is_wrong(here: Path, change: tuple[str, str], words: str) -> None:
    path = here / "ours.toml"
    path.write_text(OURS.replace(*change), encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_site(path)
    assert words in str(caught.value)


def test_lines_that_make_no_script(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    extra = '[[exports]]\nline = "X=$("\nreason = "x"\n'
    (here / "ours.toml").write_text(OURS + extra, encoding="utf-8")
    asked = ("--site-file", "ours.toml", "--nodes", "2", "--time", "1:00:00")
    assert job(*asked) == 64
    assert "make no script" in capsys.readouterr().err


def test_a_file_that_others_can_change_is_not_read(here: Path) -> None:
    path = here / "ours.toml"
    path.chmod(0o666)
    with pytest.raises(ConfigError, match="can be written by everybody"):
        load_site(path)
    path.chmod(0o644)
    if os.geteuid() == 0:
        os.chown(path, STRANGER, STRANGER)
        with pytest.raises(ConfigError, match=f"belongs to user {STRANGER}"):
            load_site(path)


def test_sites_of_the_user(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = here.parent / "config" / "hpctrain" / "sites.d"
    folder.mkdir(parents=True)
    shutil.copy("ours.toml", folder)
    (folder / "lumi.toml").write_text(OURS.replace('"ours"', '"lumi"'), encoding="utf-8")
    assert main(["job", "--sites"]) == 0
    listed = capsys.readouterr().out
    assert "ours" in listed
    assert "1 h to 4 nodes, 0.5 h to 8 nodes" in listed
    assert "LUMI-G" not in listed  # the nearer one of the name counts
    assert "#SBATCH --ntasks-per-node=2" in shown(capsys, "--site", "ours")
    asked = ("--nodes", "8", "--time", "1:00:00", "--site", "ours", "data.lanes=128")
    assert job(*asked) == 78
    assert "ours, queue short, allows 0.5 h" in capsys.readouterr().err
    assert main(["job", "--lint-site", "ours.toml"]) == 78
    assert "queues: no [[sources]] names it" in capsys.readouterr().out
    cited = '[[sources]]\nsource = "x"\ndate = "2026"\nfacts = ["nodes", "queues", "directives"]\n'
    (here / "ours.toml").write_text(OURS + cited, encoding="utf-8")
    assert main(["job", "--lint-site", "ours.toml"]) == 0


def test_a_site_is_found_by_the_names_of_its_login_nodes() -> None:
    found = site_of_host(SITES, ["login05", "login05.frontier.olcf.ornl.gov"])
    assert found is not None
    assert found.name == "frontier"
    assert site_of_host(SITES, ["laptop", "laptop.local"]) is None


def test_three_questions_and_the_command_that_they_stand_for(here: Path) -> None:
    terminal, end = pty.openpty()
    os.write(terminal, b"slurm\n3\n2:00:00\n")
    asked = subprocess.run(
        [sys.executable, "-m", "hpctrain", "job", "run.toml", "--account", "me"],
        stdin=end,
        stdout=subprocess.PIPE,
        stderr=end,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        timeout=JOB_SECONDS,
        check=False,
    )
    said = os.read(terminal, 65536).decode()
    os.close(end)
    os.close(terminal)
    assert asked.returncode == 0, said
    assert b"#SBATCH --nodes=3" in asked.stdout
    command = "job run.toml --account me --scheduler slurm --nodes 3 --time 2:00:00"
    assert command in said
    assert "up to 50 jobs x 3 nodes x 2 h = 300 node-hours" in said


def test_the_table_and_the_options(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = """
[job]
site_file = "ours.toml"
account = "m1"
memory = "64G"
directives = ["--reservation=gpu_hack"]
setup = ["module load pytorch/2.8"]
env = { NCCL_DEBUG = "INFO", B = "1" }
"""
    config = (here / "run.toml").read_text(encoding="utf-8")
    (here / "run.toml").write_text(config[: config.index("[job]")] + table, encoding="utf-8")
    options = ["--account", "m2", "--directive=--exclusive", "--env", "B=$(x)", "--qos", "high"]
    lines = shown(
        capsys, *options, "--constraint", "nvme", "--mail", "me@x.org", "--module", "cuda"
    )
    for line in (
        *("#SBATCH --account=m2", "#SBATCH --mem=64G", "#SBATCH --reservation=gpu_hack"),
        *("#SBATCH --exclusive", "#SBATCH --constraint=gpu&(nvme)", "#SBATCH --qos=high"),
        *("#SBATCH --mail-user=me@x.org", "#SBATCH --partition=short", "export B='$(x)'"),
        *("module load pytorch/2.8 || exit 69", "module load cuda || exit 69"),
        "export NCCL_DEBUG=INFO",
    ):
        assert line in lines, line
    # What is asked for on the command line is of another cluster.
    lines = shown(capsys, "--scheduler", "pbs", "--constraint", "a=b", "job.directives=[]")
    assert any(":mpiprocs=4:ngpus=4:a=b:mem=64gb" in line for line in lines)
    lines = shown(capsys, "--site", "polaris", "--nodes", "10", "job.directives=[]")
    assert "#PBS -l select=10:system=polaris:mem=64gb" in lines


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--scheduler", "lsf", "--qos", "x"], "Slurm alone"),
        (["--site", "perlmutter", "--qos", "x"], "that is what --queue names"),
        (["--scheduler", "pbs", "--constraint", "x"], "RESOURCE=VALUE"),
        (["--scheduler", "flux", "--memory", "8G"], "--memory: Flux shares out"),
        (["--scheduler", "flux", "--mail", "me@x.org"], "--mail: Flux itself sends none"),
        (["--scheduler", "flux", "--throttle", "2"], "--throttle: Flux has no job arrays"),
        (["--site", "el-capitan", "--directive=-N4"], "ask for it by --nodes"),
        (["--scheduler", "slurm", "--conda", "a", "--venv", "venv"], "one of them"),
        (["--scheduler", "slurm", "--container", "pyxis"], "go together"),
        (["--scheduler", "pbs", "--container", "pyxis", "--image", "x"], "a part of Slurm"),
        (["--scheduler", "slurm", "--bind", "/a:/b"], "only an image"),
        (["--scheduler", "slurm", "--venv", "gone"], "no bin/activate"),
        (["--scheduler", "slurm", "--env", "X"], "expected NAME=VALUE"),
        (["--scheduler", "slurm", "--max-node-hours", "0"], "0 is not above 0"),
        (["--scheduler", "slurm", "--directive=--nodes=9"], "ask for it by --nodes"),
        (
            ["--scheduler", "slurm", "--container", "shifter", "--image", "x", "--bind", "/a,/b"],
            "absolute paths without",
        ),
    ],
)
def test_wishes_that_are_refused(
    here: Path, options: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert job("--nodes", "2", "--time", "1:00:00", *options) == 64
    assert words in capsys.readouterr().err


CONTAINERS = {
    "apptainer": "python=(apptainer exec --nv --bind HERE:HERE --bind /x:/y ./image.sif python)",
    "pyxis": "python=(--container-image=image.sif --container-mounts='HERE:HERE,/x:/y' "
    '--container-workdir="$PWD" python)',
    "podman-hpc": '--volume HERE:HERE --volume /x:/y --workdir "$PWD" image.sif python)',
    "shifter": "python=(shifter --image=image.sif --volume=HERE:HERE --volume=/x:/y python)",
}


@pytest.mark.parametrize("container", CONTAINERS)
def test_images_see_the_folders_of_the_run(
    here: Path, container: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """What lies elsewhere is bound beside the project, links and all."""
    options = ("--container", container, "--image", "./image.sif", "--bind", "/x:/y")
    if container != "apptainer":
        options = (*options[:3], "image.sif", *options[4:])
    lines = shown(capsys, "--scheduler", "slurm", *options)
    expected = CONTAINERS[container].replace("HERE", str(here))
    assert any(line.endswith(expected) for line in lines), [
        line for line in lines if "python=" in line
    ]
    asks_alone = any('told=$("${alone[@]}" -m hpctrain status' in line for line in lines)
    assert asks_alone == (container == "pyxis")
    elsewhere = here.parent / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "a.h5").touch()
    (here / "link").symlink_to(elsewhere)
    lines = shown(capsys, "--scheduler", "slurm", *options, 'data.train="link/*.h5"')
    assert any(f"{elsewhere}:{elsewhere}" in line for line in lines)


def everything(kind: list[str], is_flux: bool = False) -> list[str]:
    asked = ["--nodes", "10", "--time", "0:30:00", "data.lanes=1000", "--account", "me"]
    asked += ["--env", f"X={NASTY}", "--setup", f"echo {NASTY!r}", "--setup", "source /x/y.sh"]
    asked += ["--module", "torch/2.8"]
    asked += [] if is_flux else ["--memory", "8G", "--mail", "me@x.org"]
    return [*asked, "--constraint", "a=b", "--max-node-hours", "40", *kind]


def test_scripts_of_every_site_hold_any_wish(here: Path) -> None:
    """One call of shellcheck for all: it is to find nothing in any."""
    image = ["--image", f"{NASTY}.sif", "--bind", "/a 'b' $(touch pwned)"]
    kinds = [
        *(["--container", name, *image] for name in ("apptainer", "podman-hpc", "shifter")),
        ["--venv", f"venv {NASTY}"],
        ["--conda", NASTY],
    ]
    for number, where in enumerate(EVERYWHERE):
        kind = kinds[number % len(kinds)]
        is_flux = where[1] in ("flux", "el-capitan")
        assert job(*where, *everything(kind, is_flux), "--output", f"{number}.sh") == 0
    for number, kind in enumerate([*kinds, ["--container", "pyxis", *image]]):
        asked = everything(kind)
        assert job("--scheduler", "slurm", *asked, "--output", f"kind-{number}.sh") == 0
    scripts = sorted(str(path) for path in here.glob("*.sh"))
    assert len(scripts) == len(EVERYWHERE) + len(kinds) + 1
    for script in scripts:
        subprocess.run(["bash", "-n", script], check=True)
        lines = Path(script).read_text(encoding="utf-8").splitlines()
        directives = [
            line for line in lines if line.startswith(("#SBATCH", "#PBS", "#BSUB", "#flux:"))
        ]
        assert not any("uid" in line or "pwned" in line for line in directives)
    if shutil.which("shellcheck"):
        found = subprocess.run(
            ["shellcheck", *scripts], capture_output=True, text=True, check=False
        )
        assert found.returncode == 0, found.stdout


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ([], "up to 50 jobs x 8 nodes x 2 h = 800 node-hours"),
        (["--max-jobs", "3"], "up to 3 jobs x 8 nodes x 2 h = 48 node-hours"),
        (["--max-node-hours", "40"], "up to 2 jobs x 8 nodes x 2 h = 32 node-hours"),
        (["--chain", "5"], "up to 5 jobs x 8 nodes x 2 h = 80 node-hours"),
        (["--max-node-hours", "15"], "one job may take 16"),
        (["--max-node-hours", "40", "--chain", "3"], "3 jobs of the chain may take 48 together"),
        (["--max-jobs", "2", "--chain", "3"], "more than --max-jobs 2"),
    ],
)
def test_what_the_jobs_of_a_run_may_take(
    here: Path, options: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    job("--scheduler", "slurm", "--nodes", "8", "--time", "2:00:00", *options)
    assert line in capsys.readouterr().err


def test_status_says_that_the_budget_is_spent(tmp_path: Path) -> None:
    def after(jobs: int, budget: float = 40.0) -> tuple[int, str, str]:
        facts = {"node_hours": 16.0, "asked_node_hours": 16.0 * jobs, "max_node_hours": budget}
        stopped = Outcome(code=75, reason="stopped by the time limit", step=9, tries=jobs, **facts)
        write_outcome(tmp_path, stopped)
        status = read_status(tmp_path, {}, used=(15.5, 1))
        return status.exit_code, status.explanation, ending(status)

    assert after(1)[0] == 75
    code, explanation, last_line = after(2)
    assert code == 1
    for words in (explanation, last_line):
        assert "2 jobs of up to 32 node-hours" in words
        assert "another of 16 could exceed the budget of 40" in words
    assert after(2, 48.0)[0] == 75
    assert after(3, 48.0)[0] == 1
    assert after(9, 0.0)[0] == 75


def test_definitions_of_images_are_sound(tmp_path: Path) -> None:
    """Their shell passes shellcheck, what they copy is there, and the extras are known."""
    folder = ROOT / "jobs" / "containers"
    definition = (folder / "hpctrain.def").read_text(encoding="utf-8")
    dockerfile = (folder / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    sections = dict(part.split("\n", 1) for part in definition.split("\n%")[1:])
    assert set(sections) == {"files", "post", "environment", "test"}
    copied = [line.split()[0] for line in sections["files"].splitlines() if line.strip()]
    steps = [line.split() for line in dockerfile.splitlines() if line and line[0] not in "# "]
    assert {step[0] for step in steps} <= {"FROM", "ENV", "WORKDIR", "COPY", "RUN"}
    copied += [name for step in steps if step[0] == "COPY" for name in step[1:-1]]
    assert all((ROOT / name).exists() for name in copied)
    shell = [sections["post"], *(" ".join(step[1:]) for step in steps if step[0] == "RUN")]
    for number, text in enumerate(shell):
        assert "mpich,digits,filters" in text
        script = tmp_path / f"{number}.sh"
        script.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
        if shutil.which("shellcheck"):
            subprocess.run(["shellcheck", script], check=True)


def test_the_site_of_the_docs_is_one(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "sites.md").read_text(encoding="utf-8")
    begin = page.index('    name = "ours"')
    lines = page[begin : page.index("`launcher` is a table")].splitlines()
    path = tmp_path / "ours.toml"
    path.write_text("\n".join(line[4:] for line in lines), encoding="utf-8")
    assert missing_sources(load_site(path)) == []
