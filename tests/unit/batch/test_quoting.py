"""Values that reach a job script are plain, quoted or refused; where environments are unpacked."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import tarfile
import time
from pathlib import Path

import pytest
from helpers.flux import write_flux
from helpers.limits import JOB_SECONDS

from hpctrain.batch.job_script import Job, render
from hpctrain.batch.quoting import path_word
from hpctrain.batch.sites import built_in_sites
from hpctrain.cli import main
from hpctrain.errors import UsageError

ROOT = Path(__file__).parents[3]
STRANGER = 65533
GENERIC = ("slurm", "lsf", "pbs", "flux")
EVERYWHERE = [["--scheduler", name] for name in GENERIC] + [
    ["--site", site.name] for site in built_in_sites()
]
NASTY = "a 'b' \"c\" $(touch pwned) `touch pwned`; touch pwned & # --uid=0 \\ %x {{ job }} *é"
"""Of one line: bash is to see it as one word."""
NO_LINES = [
    *("", "a\nb", "a\n#SBATCH --uid=0", "a\n#BSUB -J x", "a\n#PBS -N x", "a\r#x", "a\tb", "a\0b"),
    *(
        "a\x0bb",
        "a\x85b",
        "a\u2028b",
        "a\u2029b",
        "a\u202eb",
        "a\x1b[2Jb",
        "a\udcffb",
        "a" * 10_000,
    ),
]
NOT_PLAIN = [
    *NO_LINES,
    *(" a", "a ", "a b", "a --uid=0", "-a", "--uid=0", "$(touch pwned)", "`touch pwned`", "a;b"),
    *(
        'a"b',
        "a'b",
        "a#b",
        "#a",
        "a&b",
        "a|b",
        "a>b",
        "a\\",
        "$HOME",
        "~",
        "a*",
        "%x",
        "é",
        "a" * 256,
    ),
]
FIELDS = ("name", "account", "queue", "qos", "mail", "modules")
NARROWER = ("constraint", "memory", "directives", "setup", "env")
LINES = ("run_folder", "script", "code")
LISTS = ("modules", "directives", "setup")


def held(field: str, value: str) -> object:
    """Return a value as a field of `Job` holds it."""
    return (value,) if field in LISTS else (("X", value),) if field == "env" else value


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose files have names that a shell would stumble over."""
    work = tmp_path / "work"
    for part in ("train", "validation"):
        (work / "data" / "digits" / part).mkdir(parents=True)
    content = (ROOT / "configs" / "run.toml").read_bytes()
    for name in (f"{NASTY}.toml", "-np.toml", "run.toml"):
        (work / name).write_bytes(content)
    (work / f"{NASTY}.sif").touch()
    monkeypatch.chdir(work)
    for name in ("HPCTRAIN_CHECK", "HPCTRAIN_TOKEN", "HPCTRAIN_ATTEMPT"):
        monkeypatch.delenv(name, raising=False)
    return work


def plain_job(scheduler: str = "slurm") -> Job:
    return Job(
        command=("run.toml",),
        name="digits",
        run_folder="runs/digits",
        script="job.sh",
        scheduler=scheduler,
        nodes=2,
        seconds=3600,
        ranks_per_node=2,
        cpus_per_rank=1,
        gpus_per_node=0,
    )


@pytest.mark.parametrize("field", FIELDS)
def test_a_directive_takes_plain_words_only(field: str) -> None:
    for value in NOT_PLAIN:
        with pytest.raises(UsageError) as caught:
            dataclasses.replace(plain_job(), **{field: held(field, value)})
        assert str(caught.value).isprintable()
    for value in ("a", "m1234_g", "proj-12.x", "_x", "a,b", "q@server", "a" * 255):
        assert value in render(dataclasses.replace(plain_job(), **{field: held(field, value)}))


@pytest.mark.parametrize("field", LINES)
def test_whatever_else_a_script_names_is_one_line(field: str) -> None:
    for value in NO_LINES:
        with pytest.raises(UsageError) as caught:
            dataclasses.replace(plain_job(), **{field: value})
        assert str(caught.value).isprintable()


def test_the_command_is_made_of_lines() -> None:
    for value in NO_LINES:
        for command in ((value,), ("run.toml", value)):
            with pytest.raises(UsageError):
                dataclasses.replace(plain_job(), command=command)


def test_every_text_of_a_job_is_checked() -> None:
    """A field that is added is to be refused, too, where it holds more than a line."""
    checked = {*FIELDS, *NARROWER, *LINES, "command", "scheduler"}
    of_text = {field.name for field in dataclasses.fields(Job) if "str" in str(field.type)}
    assert of_text == checked


@pytest.mark.parametrize("field", NARROWER)
def test_what_has_a_form_of_its_own_is_one_line_of_it(field: str) -> None:
    for value in NO_LINES:
        if not value and field == "env":  # an empty variable is one
            continue
        with pytest.raises(UsageError) as caught:
            dataclasses.replace(plain_job(), **{field: held(field, value)})
        assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("constraint", ["a b", "$(x)", "a;b", "-a", "a`b", 'a"', "#a", "{{ x }}"]),
        ("memory", ["64", "64GB", "-1G", "0G", "1.5G", "64g", "$(x)G"]),
        ("directives", ["a", "--x=#b", "--x='a", '--x="', "--x=$(y)", "--x=`y`", "--x=\\", "-é"]),
        ("directives", ["--nodes=4", "-N4", "-N 4", "--uid=0", "--mem 3G", "--array=1-3", "-t 1"]),
        ("setup", ["if", "echo '", "(", "}; rm x; {", "cat <<E", "done"]),
    ],
)
def test_other_forms_are_refused(field: str, values: list[str]) -> None:
    for value in values:
        with pytest.raises(UsageError):
            dataclasses.replace(plain_job(), **{field: held(field, value)})


@pytest.mark.parametrize("name", ["", "1x", "a b", "a-b", "SLURM_X", "HPCTRAIN_TOKEN", "a$(x)"])
def test_names_of_variables(name: str) -> None:
    with pytest.raises(UsageError):
        dataclasses.replace(plain_job(), env=((name, "1"),))


@pytest.mark.parametrize("option", ["--account", "--queue"])
def test_options_are_refused_on_the_command_line(
    here: Path, option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for value in ("", "a\n#SBATCH --uid=0", "a --uid=0", "x\ntouch pwned"):
        asked = ["job", "run.toml", *EVERYWHERE[0], "--nodes", "2", "--time", "1:00:00"]
        assert main([*asked, f"{option}={value}"]) == 64
        assert f"{option} {value!a}: expected one word" in capsys.readouterr().err


@pytest.mark.parametrize("where", EVERYWHERE, ids=lambda where: where[1])
def test_scripts_of_every_site_hold_any_name(here: Path, where: list[str]) -> None:
    config, folder = f"{NASTY}.toml", NASTY.replace('"', "").replace("\\", "")
    asked = ["--nodes", "10", "--time", "1:00:00", "--output", f"{NASTY}.sh", "data.lanes=1000"]
    given = [config, f'run.directory="{folder}"', "--environment", f"{NASTY}.sif"]
    assert main(["job", *given, *where, *asked]) == 0
    script = Path(f"{NASTY}.sh")
    checked = subprocess.run(["bash", "-n", script], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr
    text = script.read_text(encoding="utf-8")
    directives = [line for line in text.splitlines() if re.match(r"#(SBATCH|PBS|BSUB|flux:)", line)]
    assert not any("uid" in line or "pwned" in line for line in directives)


@pytest.mark.parametrize(
    ("path", "word"),
    [
        ("-x", "./-x"),
        ("a:b.tar", "./a:b.tar"),
        ("./-x", "./-x"),
        ("/a:b", "/a:b"),
        ("a/-b", "a/-b"),
    ],
)
def test_no_path_is_an_option_or_a_host(path: str, word: str) -> None:
    assert path_word(path) == word


LAUNCHER = """#!/bin/bash
while [[ $1 == -* || $1 =~ ^[0-9]+$ ]]; do shift; done
[[ ! -e on-node || $1 != bash ]] || source ./on-node
exec "$@"
"""
PYTHON = """#!/bin/bash
printf '%s\\0' "$@" >>said
stat -c '%a %n' "${0%/bin/python}" >>unpacked
[[ $3 != status ]] || exit 75
"""
VARIABLES = {
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_JOB_ID": "7",
    "SLURM_CPUS_PER_TASK": "1",
    "LSB_JOBID": "7",
    "LSB_DJOB_NUMPROC": "2",
    "PBS_JOBID": "7.server",
}


class Shell:
    """Runs scripts for real; launchers and the batch system are stand-ins that run on this node."""

    def __init__(self, here: Path, programs: Path) -> None:
        self.here = here
        programs.mkdir()
        write_flux(programs)
        for name in ("srun", "mpirun", "mpiexec", "flux-run"):
            self._program(programs / name, LAUNCHER)
        for name in ("scontrol", "bsub", "qsub", "flux-batch"):
            self._program(programs / name, "#!/bin/bash\ntouch submitted\n")
        tree = programs / "tree" / "bin"
        tree.mkdir(parents=True)
        self._program(tree / "python", PYTHON)
        with tarfile.open(here / f"a:{NASTY}.tar.gz", "w:gz") as archive:
            archive.add(tree, "bin")
        (here / "nodes").write_text("one\none\n", encoding="ascii")
        self.environ = {
            **VARIABLES,
            "PATH": f"{programs}:{os.environ['PATH']}",
            "PBS_O_WORKDIR": str(here),
            "PBS_NODEFILE": str(here / "nodes"),
        }

    def _program(self, path: Path, text: str) -> None:
        path.write_text(text, encoding="utf-8")
        path.chmod(0o755)

    def run(self, scheduler: str, config: str = "run.toml", **variables: str) -> tuple[int, str]:
        asked = ["--scheduler", scheduler, "--nodes", "2", "--time", "1:00:00"]
        given = ["--environment", f"a:{NASTY}.tar.gz", "--output", "job.sh", config]
        assert main(["job", *asked, *given]) == 0
        ended = subprocess.run(
            ["bash", "job.sh"],
            env=self.environ | variables,
            capture_output=True,
            text=True,
            timeout=JOB_SECONDS,
            check=False,
        )
        return ended.returncode, ended.stderr


@pytest.fixture
def shell(here: Path, tmp_path: Path) -> Shell:
    return Shell(here, tmp_path / "programs")


@pytest.mark.parametrize("scheduler", GENERIC)
@pytest.mark.parametrize("config", [f"{NASTY}.toml", "./-np.toml"], ids=["nasty", "dash"])
def test_nothing_in_a_name_is_executed(
    here: Path, tmp_path: Path, shell: Shell, scheduler: str, config: str
) -> None:
    """And the environment is in a folder of its own while it runs, and gone at the end."""
    place = tmp_path / "a place $(touch pwned)"
    place.mkdir()
    attempt = "a[$(touch pwned)]"
    assert shell.run(scheduler, config, TMPDIR=str(place), HPCTRAIN_ATTEMPT=attempt)[0] == 64
    code, told = shell.run(scheduler, config, TMPDIR=str(place), HPCTRAIN_ATTEMPT="3")
    assert code == 75, told
    said = (here / "said").read_bytes().decode().split("\0")[:-1]
    assert said[:3] == ["-m", "hpctrain", config]
    assert said[3:7] == ["-m", "hpctrain", "status", "runs/digits"]
    for line in (here / "unpacked").read_text(encoding="utf-8").splitlines():
        assert re.fullmatch(rf"700 {re.escape(str(place))}/hpctrain-f?7\w*-[0-9a-f]{{32}}", line)
    assert (here / "submitted").exists()
    assert not list(place.iterdir())
    assert not list(tmp_path.rglob("pwned"))


def test_what_this_job_has_left_is_removed_when_it_starts_again(
    shell: Shell, tmp_path: Path
) -> None:
    """Slurm starts nothing on the nodes of a job that somebody else requeues."""
    place = tmp_path / "place"
    kept = ("hpctrain-70-" + "a" * 32, "hpctrain-0", "other")
    for name in (*kept, "hpctrain-7-" + "a" * 32):
        (place / name / "bin").mkdir(parents=True)
    (place / ("hpctrain-7-" + "b" * 32)).symlink_to(place / "other")
    assert shell.run("slurm", TMPDIR=str(place))[0] == 75
    assert {path.name for path in place.iterdir()} == {*kept, "hpctrain-7-" + "b" * 32}
    assert (place / "other" / "bin").is_dir()


def test_what_killed_jobs_have_left_is_removed_by_age_and_owner(
    shell: Shell, tmp_path: Path
) -> None:
    """After scancel nobody is left on other nodes; the next job there of this user clears up."""
    place, weeks = tmp_path / "place", 15 * 24 * 3600
    names = {name: f"hpctrain-{name}-" + "c" * 32 for name in ("1", "2", "3")}
    kept = {names["2"], "hpctrain-4-" + "c" * 31, "hpctrain-0", "a-hpctrain-5-" + "c" * 32}
    for name in (names["1"], *kept):
        (place / name / "bin").mkdir(parents=True)
        os.utime(place / name, (0, 0) if name != names["2"] else None)
    os.utime(place / names["1"], (time.time() - weeks,) * 2)
    (place / names["3"]).symlink_to(place / "hpctrain-0")
    os.utime(place / names["3"], (0, 0), follow_symlinks=False)
    kept.add(names["3"])
    if os.geteuid() == 0:
        others = place / ("hpctrain-6-" + "c" * 32)
        others.mkdir()
        os.chown(others, STRANGER, STRANGER)
        os.utime(others, (0, 0))
        kept.add(others.name)
    assert shell.run("slurm", TMPDIR=str(place))[0] == 75
    assert {path.name for path in place.iterdir()} == kept
    assert (place / "hpctrain-0" / "bin").is_dir()


def lay_open(place: Path) -> None:
    place.chmod(0o777)


def give_away(place: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("to give a folder to somebody else needs root")
    os.chown(place, STRANGER, STRANGER)


@pytest.mark.parametrize("spoil", [lay_open, give_away])
@pytest.mark.parametrize("depth", [0, 1])
def test_environments_are_unpacked_where_nobody_else_can_replace_them(
    shell: Shell, tmp_path: Path, spoil: object, depth: int
) -> None:
    place = tmp_path / "above" / "place"
    place.mkdir(parents=True)
    assert callable(spoil)
    spoil([place, place.parent][depth])
    code, told = shell.run("slurm", TMPDIR=str(place))
    assert code == 69
    assert "set TMPDIR to another directory" in told
    assert not list(place.iterdir())
    [place, place.parent][depth].chmod(0o1777)
    if spoil is lay_open:  # with the sticky bit, as /tmp has it
        assert shell.run("slurm", TMPDIR=str(place))[0] == 75
        assert not list(place.iterdir())


def test_directories_that_are_none(shell: Shell, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place in ("file", "not there"):
        code, told = shell.run("slurm", TMPDIR=str(tmp_path / place))
        assert (code, bool(told)) == (69, True)
    (shell.here / "beside").mkdir()
    assert shell.run("slurm", TMPDIR="beside")[0] == 75
    assert not list((shell.here / "beside").iterdir())


@pytest.mark.parametrize(
    "plant",
    [
        'mkdir -p precious && touch precious/file && ln -s "$PWD/precious" "$4"',
        'ln -s "$PWD/nothing" "$4"',
        'mkdir "$4"',
        'touch "$4"',
        'mv "${4%/*}" aside && ln -s "$PWD/aside" "${4%/*}"',
    ],
    ids=["link", "dangling", "folder", "file", "swapped"],
)
def test_what_is_planted_on_a_node_is_neither_used_nor_followed(
    shell: Shell, tmp_path: Path, plant: str
) -> None:
    """By somebody who sees the name on the first node before the second has made its folder."""
    place = tmp_path / "place"
    place.mkdir()
    (shell.here / "on-node").write_text(f"rm on-node; {plant}\n", encoding="utf-8")
    code, told = shell.run("slurm", TMPDIR=str(place))
    assert code == 69, told
    assert "cannot be made" in told or "is a link" in told
    assert not (shell.here / "said").exists()
    assert not (shell.here / "nothing").exists()
    if "precious" in plant:
        assert (shell.here / "precious" / "file").exists()
