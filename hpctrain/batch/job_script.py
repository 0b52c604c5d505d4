"""Job scripts: what is asked of the batch system, and the script that asks for it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from hpctrain.batch.environments import Environment, in_snapshot
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
from hpctrain.batch.sites import Because, Site
from hpctrain.batch.sweep import Point, Sweep, index_list
from hpctrain.config.writing import to_value
from hpctrain.errors import UsageError
from hpctrain.utils.text import plural

_ACCOUNT = "my_account"

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
        **dict.fromkeys(("-a", "--array"), "--sweep"),
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
        "-J": "--sweep",
        **dict.fromkeys(("-o", "-e", "-j", "-r", "-u", "-S"), ""),
    },
    "flux": {
        **dict.fromkeys(("-N", "--nodes", "-n", "--nslots"), "--nodes"),
        **dict.fromkeys(("-c", "--cores-per-slot"), "--ranks-per-node and --cpus-per-rank"),
        **dict.fromkeys(("-g", "--gpus-per-slot"), "--gpus-per-node"),
        **dict.fromkeys(("-t", "--time-limit"), "--time"),
        **dict.fromkeys(("-B", "--bank"), "--account"),
        **dict.fromkeys(("-q", "--queue"), "--queue"),
        "--requires": "--constraint",
        "--job-name": "run.name",
        **dict.fromkeys(("--output", "--error", "--input", "--cwd"), ""),
        **dict.fromkeys(("--signal", "--dependency", "--wrap", "--dry-run"), ""),
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
        sweep: the points that a job array trains, None: one run.
        throttle: elements of the array that may run at once; None: any number.
        pack: points of each job, side by side.
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
    sweep: Sweep | None = None
    throttle: int | None = None
    pack: int = 1

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
        points = self.sweep.points if self.sweep else ()
        swept = [override for point in points for override in point.overrides]
        for override in (*self.command[1:], *swept):
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
        if not option.startswith("--") and self.scheduler in ("slurm", "flux"):
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
        point = ' "${point[@]}"' if self.sweep else ""
        if self.code is None:
            return shlex.join([path_word(self.command[0]), *self.command[1:]]) + point
        config = in_snapshot(Path(self.command[0]), Path(self.code))
        words = [path_word(str(config)), *self.command[1:], "--code", self.code]
        return shlex.join(words) + point

    @property
    def run(self) -> str:
        """The run's folder, as a word of bash."""
        return '"$run"' if self.sweep else quoted_path(self.run_folder)

    @property
    def elements(self) -> int:
        """Elements of the job array; 1 without a sweep."""
        return -(-len(self.sweep.points) // self.pack) if self.sweep else 1

    def array(self, elements: Iterable[int]) -> str:
        """Return these elements of the array as the scheduler takes them, with the throttle."""
        first = 1 if self.scheduler == "lsf" else 0
        limit = f"%{self.throttle}" if self.throttle else ""
        indices = index_list(element + first for element in elements)
        return f"{self.name}[{indices}]{limit}" if self.scheduler == "lsf" else indices + limit

    @property
    def ranks(self) -> int:
        return self.nodes * self.ranks_per_node

    @property
    def node_hours(self) -> float:
        """What one job may take."""
        return self.nodes * self.seconds / 3600

    @property
    def run_node_hours(self) -> float:
        """What one job may take of each run in it."""
        return self.node_hours / self.pack

    @property
    def max_run_node_hours(self) -> float | None:
        """Bound of each run: points of a sweep have equal parts of it."""
        if self.max_node_hours is None:
            return None
        return self.max_node_hours / (self.elements * self.pack)

    @property
    def most_jobs(self) -> int:
        """Jobs of a new run that the script submits at most."""
        if self.chain > 1:
            return self.chain
        if self.max_run_node_hours is None:
            return self.max_jobs
        # A sum of bounds may come out by a bit above what it is: 0.1 three times is within 0.3.
        return min(self.max_jobs, int(self.max_run_node_hours / self.run_node_hours + 1e-9))


def bound(job: Job) -> str:
    """Return what the jobs of a run, or of all points of a sweep, may take together, in a line."""
    jobs, hours, elements = job.most_jobs, job.seconds / 3600, job.elements
    array = f"{plural(elements, 'point' if job.pack == 1 else 'group')} x " if job.sweep else ""
    return (
        f"up to {array}{plural(jobs, 'job')} x {plural(job.nodes, 'node')} x {hours:.4g} h = "
        f"{elements * jobs * job.node_hours:,.4g} node-hours"
    )


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
        points=[] if job.sweep is None else [_case(point) for point in job.sweep.points],
        sweep_key=shlex.quote(f"run.directory={to_value(job.run_folder)}"),
        part=_part(job),
        array=job.array(range(job.elements)) if job.sweep else None,
    )
    script = re.sub(r"\n{3,}", "\n\n", text)
    if (problem := bash_problem(script)) is not None:
        raise UsageError(f"the lines of the site or the setup make no script: {problem}")
    return script


def _case(point: Point) -> tuple[int, str]:
    """Return a point's number, and its overrides as words of bash."""
    return point.number, shlex.join(point.overrides)


def _part(job: Job) -> dict[str, int]:
    """Return what each of the points of a packed job has of the nodes."""
    nodes = max(1, job.nodes // job.pack)
    ranks = job.ranks // job.pack
    gpus = (job.gpus_per_node or 0) * job.nodes // job.pack // nodes
    return {"nodes": nodes, "ranks": ranks, "ranks_per_node": ranks // nodes, "gpus": gpus}


def _has_signs(job: Job) -> bool:
    """Whether what is asked for holds signs of the shell, which shellcheck takes for slips."""
    brought = job.environment
    texts: list[str | None] = [
        *job.command,
        job.run_folder,
        job.script,
        *job.setup,
        *(value for _, value in job.env),
        *(text for point in (job.sweep.points if job.sweep else ()) for text in point.overrides),
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
    elif job.scheduler == "flux":
        if job.constraint:
            # Quoted: Flux reads its directives as a shell does, which ends words at & and |.
            pairs.append(("What the nodes have to have.", f'--requires="{job.constraint}"'))
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
