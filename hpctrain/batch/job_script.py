"""Job scripts: what is asked for, whether that can run, the script itself, and its submission."""

from __future__ import annotations

import dataclasses
import re
import secrets
import shlex
import subprocess
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hpctrain.batch.environments import KINDS, Environment, environment
from hpctrain.batch.geometry import geometry
from hpctrain.batch.quoting import (
    bash_problem,
    constraint_value,
    directive,
    memory_value,
    path_word,
    plain_value,
    quoted_path,
    require_line,
    setup_line,
    variable,
)
from hpctrain.batch.sites import Because, Site, find_site, load_site, longest_hours
from hpctrain.batch.snapshot import in_snapshot
from hpctrain.batch.stop import reserve_seconds
from hpctrain.config.schema import SCHEDULERS, Config, JobSection
from hpctrain.errors import ConfigError, LaunchError, UsageError
from hpctrain.utils.text import plural

_ACCOUNT = "my_account"

_TIME = re.compile(r"(?:(\d+)-)?(\d+):([0-5]\d):([0-5]\d)")
_SIGNAL_SECONDS = 300

_SET_BY_SCRIPT: dict[str, dict[str, str]] = {
    "slurm": {
        **dict.fromkeys(("-N", "--nodes"), "--nodes"),
        **dict.fromkeys(("-t", "--time"), "--time"),
        **dict.fromkeys(("-A", "--account"), "--account"),
        **dict.fromkeys(("-p", "--partition"), "--queue"),
        **dict.fromkeys(("-q", "--qos"), "--qos"),
        **dict.fromkeys(("-C", "--constraint"), "--constraint"),
        **dict.fromkeys(("-n", "--ntasks", "--ntasks-per-node"), "--ranks-per-node"),
        **dict.fromkeys(("-c", "--cpus-per-task"), "--cpus-per-rank"),
        **dict.fromkeys(("-G", "--gpus", "--gpus-per-node"), "--gpus-per-node"),
        "--mem": "--memory",
        "--mail-user": "--mail",
        **dict.fromkeys(("-J", "--job-name"), "run.name"),
        **dict.fromkeys(("-a", "--array"), "a script for each element"),
        **dict.fromkeys(("-o", "--output", "-i", "--input", "--open-mode"), ""),
        **dict.fromkeys(("--requeue", "--no-requeue", "--signal", "--wrap", "--uid", "--gid"), ""),
    },
    "lsf": {
        "-P": "--account",
        "-q": "--queue",
        "-W": "--time",
        **dict.fromkeys(("-n", "-nnodes"), "--nodes"),
        "-gpu": "--gpus-per-node",
        "-u": "--mail",
        "-J": "run.name",
        **dict.fromkeys(("-o", "-oo", "-i", "-wa", "-wt", "-r", "-rn", "-U"), ""),
    },
    "pbs": {
        "-A": "--account",
        "-q": "--queue",
        "-l walltime": "--time",
        "-l select": "--nodes, --memory and --constraint",
        "-M": "--mail",
        "-N": "run.name",
        **dict.fromkeys(("-o", "-e", "-j", "-r", "-u", "-S", "-J"), ""),
    },
}
"""Options of schedulers that a script sets itself, and by what they are asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What is asked of the batch system.

    Attributes:
        command: the config and its overrides, as they follow `python -m hpctrain`.
        run_folder: path of the run's folder.
        script: the file that the script will be in; it submits itself again.
        site: one that is known, None: a generic cluster.
        gpus_per_node: number that the scheduler is asked for; None: none, or as the site asks.
        directives: further options of the scheduler.
        setup: lines of bash before Python is looked for.
        env: variables, by name.
        modules: of the site, to load.
        chain: jobs that are submitted at once, each after the one before; 1: none, the script
            submits itself again instead.
        max_jobs: jobs of the run at most.
        max_node_hours: of all jobs of the run, each at its limit; None: no bound.
        code: a snapshot of the project to run from; None: the project as it is then.
        environment: what brings Python.
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
    qos: str | None = None
    constraint: str | None = None
    memory: str | None = None
    mail: str | None = None
    ranks_per_node: int
    cpus_per_rank: int
    gpus_per_node: int | None
    directives: tuple[str, ...] = ()
    setup: tuple[str, ...] = ()
    env: tuple[tuple[str, str], ...] = ()
    modules: tuple[str, ...] = ()
    chain: int = 1
    max_jobs: int = 50
    max_node_hours: float | None = None
    environment: Environment = field(default_factory=Environment)
    code: str | None = None

    def __post_init__(self) -> None:
        """Refuse what would be more than a value in a script.

        Raises:
            UsageError: naming the first.
        """
        plain_value(self.name, "run.name")
        for option in ("account", "queue", "qos", "mail"):
            if (value := getattr(self, option)) is not None:
                plain_value(value, f"--{option}")
        if self.constraint is not None:
            constraint_value(self.constraint, "--constraint")
        if self.memory is not None:
            memory_value(self.memory, "--memory")
        for text in self.directives:
            self._refuse_own(directive(text, "--directive"))
        for module in self.modules:
            plain_value(module, "--module")
        for text in self.setup:
            setup_line(text, "--setup")
        for name, value in self.env:
            variable(name, value, "--env")
        lines = {
            "the config": self.command[0],
            "run.directory": self.run_folder,
            "--output": self.script,
            "--snapshot": self.code,
        }
        for what, line in lines.items():
            if line is not None:
                require_line(line, what)
        for override in self.command[1:]:
            require_line(override, "the override")

    def _refuse_own(self, text: str) -> None:
        """Refuse an option of the scheduler that the script sets itself.

        Raises:
            UsageError: naming what asks for it.
        """
        words = text.split()
        option = words[0].partition("=")[0]
        known = _SET_BY_SCRIPT[self.scheduler]
        found = {option, f"{option} {words[1].partition('=')[0]}" if len(words) > 1 else option}
        if not option.startswith("--") and self.scheduler == "slurm":
            found.add(option[:2])  # -N4
        for name in found & known.keys():
            instead = known[name]
            raise UsageError(
                f"--directive={text}: the script sets {name} itself"
                + (f": ask for it by {instead}" if instead else "")
            )

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

    @property
    def node_hours(self) -> float:
        """What one job may take."""
        return self.nodes * self.seconds / 3600

    @property
    def most_jobs(self) -> int:
        """Jobs of a new run that the script submits at most."""
        if self.chain > 1:
            return self.chain
        if self.max_node_hours is None:
            return self.max_jobs
        # A sum of bounds may come out by a bit above what it is: 0.1 three times is within 0.3.
        return min(self.max_jobs, int(self.max_node_hours / self.node_hours + 1e-9))


def bound(job: Job) -> str:
    """Return what the jobs of a run may take together, in a line."""
    jobs, hours = job.most_jobs, job.seconds / 3600
    return (
        f"up to {plural(jobs, 'job')} x {plural(job.nodes, 'node')} x {hours:.4g} h = "
        f"{jobs * job.node_hours:,.4g} node-hours"
    )


def plan(config: Config, wishes: Mapping[str, Any]) -> Job:
    """Return the job that a command line asks for, over the config's [job] table.

    What both leave out the site knows.

    Raises:
        UsageError: if the wishes contradict each other, or nodes or time are missing.
    """
    asked = _asked(config.job, wishes)
    site = site_of(asked)
    scheduler = asked["scheduler"] or (site.scheduler if site else None)
    if scheduler is None:
        raise UsageError(f"--scheduler is needed ({', '.join(SCHEDULERS)}), or --site")
    if site is not None and scheduler != site.scheduler:
        raise UsageError(f"--scheduler {scheduler}: {site.name} runs {site.scheduler}")
    for option in ("nodes", "time"):
        if asked[option] is None:
            raise UsageError(f"--{option} is needed, or {option} in the config's [job] table")
    _refuse_foreign(scheduler, site, asked)
    name = config.run.name
    node = geometry(
        site,
        ranks=asked["ranks_per_node"],
        cpus_per_rank=asked["cpus_per_rank"],
        gpus=asked["gpus_per_node"],
    )
    given = (
        *("account", "queue", "qos", "constraint", "memory", "mail"),
        *("max_jobs", "max_node_hours", "directives", "setup", "modules"),
    )
    chosen = {key: asked[key] for key in given if asked[key] is not None}
    return Job(
        command=(wishes["config"], *wishes["overrides"]),
        name=name,
        run_folder=str(Path(config.run.directory, name)),
        script=str(wishes["output"] or f"{name}.{site.name if site else scheduler}.sh"),
        scheduler=scheduler,
        site=site,
        nodes=asked["nodes"],
        seconds=parse_time(asked["time"]),
        ranks_per_node=node.ranks,
        cpus_per_rank=node.cpus_per_rank,
        gpus_per_node=node.gpus,
        env=tuple(asked["env"].items()),
        chain=wishes["chain"] or 1,
        environment=environment(config, wishes["config"], scheduler, asked),
        **chosen,
    )


def _asked(section: JobSection, wishes: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is asked for: options count before keys, and lists of both are joined."""
    asked = dataclasses.asdict(section)
    if any(wishes[kind] is not None for kind in KINDS):
        asked |= dict.fromkeys(KINDS)
    if wishes["site"] or wishes["scheduler"] or wishes["site_file"]:
        asked |= dict.fromkeys(("site", "site_file", "scheduler"))
    for key, before in asked.items():
        wish = wishes[key]
        if isinstance(before, tuple):
            asked[key] = (*before, *(wish or ()))
        elif isinstance(before, dict):
            asked[key] = {**before, **dict(_assignment(text) for text in wish or ())}
        elif wish is not None:
            asked[key] = wish
    return asked


def _assignment(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise UsageError(f"--env {text!a}: expected NAME=VALUE")
    return name, value


def site_of(asked: Mapping[str, Any]) -> Site | None:
    """Return the site that is asked for by name or by file, None: none is.

    Raises:
        UsageError: if no site has this name.
        ConfigError: if a site file is wrong.
    """
    if asked["site"]:
        return find_site(asked["site"], asked["site_file"])
    return load_site(Path(asked["site_file"])) if asked["site_file"] else None


def _refuse_foreign(scheduler: str, site: Site | None, asked: Mapping[str, Any]) -> None:
    """Refuse wishes that this scheduler knows no way to fulfil.

    Raises:
        UsageError: naming the first.
    """
    if asked["qos"] is not None:
        if scheduler != "slurm":
            raise UsageError("--qos: Slurm alone has a quality of service; take --directive")
        if site is not None and site.queue_option == "--qos":
            raise UsageError(f"--qos: on {site.name} that is what --queue names")
    if asked["constraint"] is not None and scheduler == "pbs" and "=" not in asked["constraint"]:
        raise UsageError("--constraint: PBS wants RESOURCE=VALUE, such as system=polaris")


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
    if (
        job.max_node_hours is not None
        and job.most_jobs * job.node_hours > job.max_node_hours + 1e-6
    ):
        problems.append(
            f"--max-node-hours {job.max_node_hours:g}: the {job.chain} jobs of the chain may take "
            f"{job.chain * job.node_hours:g} together"
        )
    elif job.most_jobs < 1:
        problems.append(
            f"--max-node-hours {job.max_node_hours:g}: one job may take {job.node_hours:g}"
        )
    if job.chain > job.max_jobs:
        problems.append(f"--chain {job.chain}: more than --max-jobs {job.max_jobs}")
    problems += _beyond_queue(job)
    if problems:
        lines = "".join(f"\n  {problem}" for problem in problems)
        raise ConfigError(f"this job cannot run:{lines}")


def _beyond_queue(job: Job) -> list[str]:
    """Return what stands against a job in its queue, as far as that is known."""
    site = job.site
    queue = site.find_queue(job.queue) if site is not None else None
    if site is None or queue is None:
        return []
    problems = []
    if job.nodes < queue.fewest_nodes:
        problems.append(
            f"{job.nodes} nodes: {site.name}, queue {queue.name}, begins at {queue.fewest_nodes}. "
            "Take more, or another --queue"
        )
    hours = longest_hours(queue, job.nodes)
    if hours is None and queue.limits:
        problems.append(
            f"{job.nodes} nodes: {site.name}, queue {queue.name}, has at most "
            f"{queue.limits[-1].nodes}"
        )
    elif hours is not None and job.seconds > hours * 3600:
        problems.append(
            f"--time is {job.seconds / 3600:g} h: {site.name}, queue {queue.name}, allows "
            f"{hours:g} h for {job.nodes} nodes. Ask for less and --chain, or for another --queue"
        )
    return problems


def render(job: Job) -> str:
    """Return the script, for bash.

    Raises:
        UsageError: if lines of the site or of the setup make it no bash.
    """
    from jinja2 import Environment as TemplateEnvironment
    from jinja2 import PackageLoader, StrictUndefined

    templates = TemplateEnvironment(
        loader=PackageLoader("hpctrain.batch"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # shell, not HTML: see hpctrain.batch.quoting
    )
    templates.filters["path"] = quoted_path
    site = job.site
    brought = job.environment
    gpus = "" if job.gpus_per_node == 0 else (site.container_gpus if site else "--nv")
    text = templates.get_template(f"{job.scheduler}.sh.j2").render(
        job=job,
        title=site.title if site else None,
        source=site.cited if site else None,
        notes=site.notes if site else (),
        edit="EDIT: " if job.account == _ACCOUNT else "",
        queue=job.queue or (site.queue if site else None),
        queue_option=(site.queue_option if site else "") or "--partition",
        directives=_directives(job),
        selection=_selection(job) if site is None else "",
        setup=_setup(job),
        variables=[variable(name, value, "--env") for name, value in job.env],
        modules=_pairs(
            (site.image_modules if brought.image else site.modules) if site else (), job
        ),
        exports=_pairs(site.exports if site else (), job),
        launcher=_pairs((site.launcher,), job)[0] if site and site.launcher else None,
        clock=_clock(job.seconds),
        minutes=f"{job.seconds // 3600}:{job.seconds % 3600 // 60:02}",
        signal_seconds=max(10, min(_SIGNAL_SECONDS, job.seconds // 6)),
        image=brought.image,
        contained=brought.words(
            gpus=gpus,
            modules=site.shifter_modules if site else "",
            variables=[name for name, _ in job.env],
        ),
        max_tries=job.max_jobs,
        train=job.train,
        has_signs=_has_signs(job),
    )
    script = re.sub(r"\n{3,}", "\n\n", text)
    if (problem := bash_problem(script)) is not None:
        raise UsageError(f"the lines of the site or the setup make no script: {problem}")
    return script


def _has_signs(job: Job) -> bool:
    """Whether what is asked for holds signs of the shell, which shellcheck takes for slips."""
    brought = job.environment
    texts: list[str | None] = [
        *job.command,
        job.run_folder,
        job.script,
        *job.setup,
        *(value for _, value in job.env),
    ]
    texts += [brought.packed, brought.conda, brought.venv, brought.image, job.code]
    texts += [end for ends in brought.binds for end in ends]
    return any(sign in text for text in texts if text for sign in "$`'\\")


def _setup(job: Job) -> list[str]:
    """Return the user's own lines before Python is looked for; one that fails ends the job.

    Modules come last: a line may define what `module` is, or where it looks.
    """
    lines = [setup_line(text, "--setup") for text in job.setup]
    return [f"{line} || exit 69" for line in (*lines, *(f"module load {x}" for x in job.modules))]


def _directives(job: Job) -> list[tuple[str, str]]:
    """Return (reason, line) of the site's directives and of what is asked for beyond them."""
    pairs = _pairs(job.site.directives if job.site else (), job)
    if job.scheduler == "slurm":
        pairs = _of_slurm(job, pairs)
    elif job.scheduler == "lsf":
        if job.constraint:
            pairs.append(("What the nodes have to have.", f'-R "select[{job.constraint}]"'))
        if job.memory:
            pairs.append(("Memory of each node.", f'-R "rusage[mem={job.memory}B/host]"'))
        if job.mail:
            pairs += [("Whom it tells of the end.", f"-u {job.mail}"), ("And that it does.", "-N")]
    else:
        extra = _selection(job) if job.site else ""
        pairs = [
            (reason, line + extra if line.startswith("-l select=") else line)
            for reason, line in pairs
        ]
        if job.mail:
            pairs += [("Whom it tells of end and failure.", f"-M {job.mail}"), ("These.", "-m ae")]
    return [*pairs, *(("As asked for.", line) for line in job.directives)]


def _of_slurm(job: Job, pairs: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return directives of Slurm, of which the last of a name counts: constraints are joined."""
    if job.constraint:
        name = "--constraint="
        held = [line.removeprefix(name) for _, line in pairs if line.startswith(name)]
        joined = "&".join([*held, f"({job.constraint})" if held else job.constraint])
        pairs = [pair for pair in pairs if not pair[1].startswith(name)]
        pairs.append(("What the nodes have to have.", name + joined))
    for value, reason, option in (
        (job.qos, "Quality of service.", "--qos="),
        (job.memory, "Memory of each node.", "--mem="),
        (job.mail, "Whom it tells of these.", "--mail-user="),
        ("END,FAIL,REQUEUE" if job.mail else None, "They are:", "--mail-type="),
    ):
        if value:
            pairs.append((reason, option + value))
    return pairs


def _selection(job: Job) -> str:
    """Return what is asked of each node, as PBS has it in a chunk."""
    memory = f":mem={job.memory.lower()}b" if job.memory else ""
    return (f":{job.constraint}" if job.constraint else "") + memory


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
