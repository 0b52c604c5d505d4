"""Job scripts: what is asked for, whether that can run, the script itself, and its submission."""

from __future__ import annotations

import re
import secrets
import shlex
import subprocess
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpctrain.batch.geometry import geometry
from hpctrain.batch.quoting import path_word, plain_value, quoted_path, require_line
from hpctrain.batch.sites import Because, Site, find_site, longest_hours
from hpctrain.batch.snapshot import in_snapshot
from hpctrain.batch.stop import reserve_seconds
from hpctrain.config.schema import Config
from hpctrain.errors import ConfigError, LaunchError, UsageError

SCHEDULERS = ("slurm", "lsf", "pbs")
_ACCOUNT = "my_account"
_MAX_TRIES = 50
_ENVIRONMENTS = (".sif", ".tar", ".tar.gz", ".tgz")

_TIME = re.compile(r"(?:(\d+)-)?(\d+):([0-5]\d):([0-5]\d)")
_SIGNAL_SECONDS = 300


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What is asked of the batch system.

    Attributes:
        command: the config and its overrides, as they follow `python -m hpctrain`.
        run_folder: path of the run's folder.
        script: the file that the script will be in; it submits itself again.
        site: one of the table, None: a generic cluster.
        gpus_per_node: number that the scheduler is asked for; None: none, or as the site asks.
        chain: jobs that are submitted at once, each after the one before; 1: none, the script
            submits itself again instead.
        code: a snapshot of the project to run from; None: the project as it is then.
        environment: an image (.sif), or a packed environment (.tar, .tar.gz), of which every node
            gets a copy; None: .venv, where there is one.
    """

    command: tuple[str, ...]
    name: str
    run_folder: str
    script: str
    scheduler: str
    site: Site | None = None
    nodes: int
    seconds: int
    account: str = _ACCOUNT
    queue: str | None = None
    ranks_per_node: int
    cpus_per_rank: int
    gpus_per_node: int | None
    chain: int = 1
    environment: str | None = None
    code: str | None = None

    def __post_init__(self) -> None:
        """Refuse what would be more than a value in a script.

        Raises:
            UsageError: naming the first.
        """
        plain_value(self.name, "run.name")
        plain_value(self.account, "--account")
        if self.queue is not None:
            plain_value(self.queue, "--queue")
        lines = {
            "the config": self.command[0],
            "run.directory": self.run_folder,
            "--output": self.script,
            "--environment": self.environment,
            "--snapshot": self.code,
        }
        for what, text in lines.items():
            if text is not None:
                require_line(text, what)
        for override in self.command[1:]:
            require_line(override, "the override")

    @property
    def train(self) -> str:
        """What follows `python -m hpctrain` in the script."""
        if self.code is None:
            return shlex.join([path_word(self.command[0]), *self.command[1:]])
        config = in_snapshot(Path(self.command[0]), Path(self.code))
        return shlex.join([path_word(str(config)), *self.command[1:], "--code", self.code])

    @property
    def ranks(self) -> int:
        return self.nodes * self.ranks_per_node


def plan(config: Config, wishes: Mapping[str, Any]) -> Job:
    """Return the job that a command line asks for; what it leaves out the site knows.

    Raises:
        UsageError: if the wishes contradict each other.
    """
    site = find_site(wishes["site"]) if wishes["site"] else None
    scheduler = wishes["scheduler"] or (site.scheduler if site else None)
    if scheduler is None:
        raise UsageError(f"--scheduler is needed ({', '.join(SCHEDULERS)}), or --site")
    if site is not None and scheduler != site.scheduler:
        raise UsageError(f"--scheduler {scheduler}: {site.name} runs {site.scheduler}")
    name = config.run.name
    node = geometry(
        site,
        ranks=wishes["ranks_per_node"],
        cpus_per_rank=wishes["cpus_per_rank"],
        gpus=wishes["gpus_per_node"],
    )
    if wishes["environment"] is not None:
        _require_environment(Path(wishes["environment"]))
    given = ("account", "queue", "environment", "chain")
    chosen = {key: wishes[key] for key in given if wishes[key] is not None}
    return Job(
        command=(wishes["config"], *wishes["overrides"]),
        name=name,
        run_folder=str(Path(config.run.directory, name)),
        script=str(wishes["output"] or f"{name}.{site.name if site else scheduler}.sh"),
        scheduler=scheduler,
        site=site,
        nodes=wishes["nodes"],
        seconds=parse_time(wishes["time"]),
        ranks_per_node=node.ranks,
        cpus_per_rank=node.cpus_per_rank,
        gpus_per_node=node.gpus,
        **chosen,
    )


def _require_environment(path: Path) -> None:
    """Check that an environment is there, and of a kind that the script can bring to the nodes."""
    if not path.name.endswith(_ENVIRONMENTS):
        raise UsageError(
            f"--environment {path}: neither an image nor a packed environment by its name "
            f"({', '.join(_ENVIRONMENTS)})"
        )
    if not path.is_file():
        raise UsageError(f"--environment {path}: no such file")


def write(path: Path, text: str) -> None:
    """Write a script, executable.

    Raises:
        UsageError: if that is not possible.
    """
    if path.exists() and not path.is_file():
        raise UsageError(f"--output {path}: is not a file; without --output the script is printed")
    try:
        path.write_text(text, encoding="utf-8")
        path.chmod(0o755)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from error


def parse_time(text: str) -> int:
    """Return the seconds of a time such as "2:00:00" or "1-12:00:00".

    Raises:
        UsageError: if it is none. Schedulers differ in what "2:00" means.
    """
    match = _TIME.fullmatch(text)
    seconds = 0
    if match is not None:
        days, hours, minutes, rest = (int(part or 0) for part in match.groups())
        seconds = ((days * 24 + hours) * 60 + minutes) * 60 + rest
    if not seconds:
        raise UsageError(f"--time {text}: expected hours:minutes:seconds, such as 2:00:00")
    return seconds


def check(job: Job, *, lanes: int | None, save_seconds: float) -> None:
    """Refuse a job that cannot run.

    Args:
        job: the job that is asked for.
        lanes: largest number of ranks that can train; None: any number can.
        save_seconds: seconds of a save of this run, 0 if there was none yet.

    Raises:
        ConfigError: with everything that stands against it.
    """
    problems = []
    if lanes is not None and job.ranks > lanes:
        problems.append(
            f"{job.nodes} nodes of {job.ranks_per_node} ranks are {job.ranks} ranks, and "
            f"data.lanes = {lanes} is the most that can train: set data.lanes={job.ranks}, or take "
            f"{max(1, lanes // job.ranks_per_node)} nodes"
        )
    needed = reserve_seconds(0.0, save_seconds)
    if job.seconds <= needed:
        problems.append(
            f"--time is {job.seconds} s, and the end of a job, with a save of {save_seconds:.0f} "
            f"s, takes up to {needed:.0f} s: no step could be trained"
        )
    if job.scheduler == "lsf" and job.seconds < 60:
        problems.append("--time: LSF counts whole minutes")
    site = job.site
    if site is not None and job.queue in (None, site.queue) and site.limits:
        if job.nodes < site.fewest_nodes:
            problems.append(
                f"{job.nodes} nodes: {site.name}, queue {site.queue}, begins at "
                f"{site.fewest_nodes}. Take more, or another --queue"
            )
        hours = longest_hours(site, job.nodes)
        queue = f"queue {site.queue}" if site.queue else "its queues"
        if hours is None:
            problems.append(
                f"{job.nodes} nodes: {site.name}, {queue}, has at most {site.limits[-1].nodes}"
            )
        elif job.seconds > hours * 3600:
            problems.append(
                f"--time is {job.seconds / 3600:g} h: {site.name}, {queue}, allows {hours:g} h for "
                f"{job.nodes} nodes. Ask for less and --chain, or for another --queue"
            )
    if problems:
        lines = "".join(f"\n  {problem}" for problem in problems)
        raise ConfigError(f"this job cannot run:{lines}")


def render(job: Job) -> str:
    """Return the script, for bash."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("hpctrain.batch"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # shell, not HTML: see hpctrain.batch.quoting
    )
    environment.filters["path"] = quoted_path
    site = job.site
    image = job.environment if Path(job.environment or "").suffix == ".sif" else None
    text = environment.get_template(f"{job.scheduler}.sh.j2").render(
        job=job,
        title=site.title if site else None,
        source=site.source if site else None,
        container_gpus=site.container_gpus if site else "--nv",
        notes=site.notes if site else (),
        edit="EDIT: " if job.account == _ACCOUNT else "",
        queue=job.queue or (site.queue if site else None),
        queue_option=(site.queue_option if site else "") or "--partition",
        directives=_pairs(site.directives if site else (), job),
        modules=_pairs((site.image_modules if image else site.modules) if site else (), job),
        exports=_pairs(site.exports if site else (), job),
        launcher=_pairs((site.launcher,), job)[0] if site and site.launcher else None,
        clock=_clock(job.seconds),
        minutes=f"{job.seconds // 3600}:{job.seconds % 3600 // 60:02}",
        signal_seconds=max(10, min(_SIGNAL_SECONDS, job.seconds // 6)),
        image=image,
        max_tries=_MAX_TRIES,
        train=job.train,
    )
    return re.sub(r"\n{3,}", "\n\n", text)


def _pairs(lines: Iterable[Because], job: Job) -> list[tuple[str, str]]:
    """Return (reason, line), with the numbers of this job in place."""
    numbers = {
        "{nodes}": job.nodes,
        "{ranks}": job.ranks,
        "{ranks_per_node}": job.ranks_per_node,
        "{cpus}": job.cpus_per_rank,
    }
    pairs = []
    for item in lines:
        line = item.line
        for word, number in numbers.items():
            line = line.replace(word, str(number))
        pairs.append((item.reason, line))
    return pairs


def _clock(seconds: int) -> str:
    return f"{seconds // 3600:02}:{seconds % 3600 // 60:02}:{seconds % 60:02}"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Submission:
    """How one batch system takes jobs.

    Attributes:
        command: command line without the script.
        after: options that let a job start when another has ended, however it did.
        telling: options that give a job variables beside those of its own.
        from_stdin: the script is read from standard input, not named.
        job: finds the job's id in what the command prints.
    """

    command: tuple[str, ...]
    after: Callable[[str], tuple[str, ...]]
    telling: Callable[[str], tuple[str, ...]]
    from_stdin: bool = False
    job: re.Pattern[str]


_SUBMISSIONS = {
    "slurm": _Submission(
        command=("sbatch", "--parsable"),
        after=lambda job: (f"--dependency=afterany:{job}",),
        telling=lambda variables: (f"--export=ALL,{variables}",),
        job=re.compile(r"^(\d+)", re.MULTILINE),
    ),
    "lsf": _Submission(
        command=("bsub",),
        after=lambda job: ("-w", f"ended({job})"),
        telling=lambda variables: ("-env", f"all,{variables}"),
        from_stdin=True,
        job=re.compile(r"^Job <(\d+)> is submitted", re.MULTILINE),
    ),
    "pbs": _Submission(
        command=("qsub",),
        after=lambda job: ("-W", f"depend=afterany:{job}"),
        telling=lambda variables: ("-v", variables),
        job=re.compile(r"^(\d+\S*)$", re.MULTILINE),
    ),
}


def submit(script: Path, scheduler: str, chain: int = 1) -> list[str]:
    """Submit a script so many times, each job after the one before; return the jobs' ids.

    Raises:
        LaunchError: if the batch system is not here, or does not take it; the message names the
            jobs that it has taken.
    """
    submission = _SUBMISSIONS[scheduler]
    jobs: list[str] = []
    token = f"chain-{secrets.token_hex(8)}"
    for attempt in range(1, chain + 1):
        after = submission.after(jobs[-1]) if jobs else ()
        if chain > 1:
            variables = f"HPCTRAIN_TOKEN={token},HPCTRAIN_ATTEMPT={attempt}"
            after = (*after, *submission.telling(variables))
        named = () if submission.from_stdin else (path_word(str(script)),)
        command = (*submission.command, *after, *named)
        problem = ""
        try:
            result = subprocess.run(
                command,
                input=script.read_text(encoding="utf-8") if submission.from_stdin else "",
                capture_output=True,
                text=True,
                check=False,
            )
        except OSError as error:
            problem = error.strerror or str(error)
        else:
            found = submission.job.search(result.stdout)
            if result.returncode == 0 and found is not None:
                jobs.append(found[1])
                continue
            problem = (result.stderr or result.stdout).strip() or f"code {result.returncode}"
        taken = f" (submitted before: {' '.join(jobs)})" if jobs else ""
        raise LaunchError(f"cannot submit {script} by {' '.join(command)}{taken}: {problem}")
    return jobs
