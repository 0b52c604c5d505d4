"""`job`: a job script, or that of a sweep, printed, written or submitted."""

from __future__ import annotations

import dataclasses
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpctrain.cli.usage import PROGRAM, Parser, count, hours, number
from hpctrain.config.schema_job import SCHEDULERS
from hpctrain.errors import ConfigError, ExitCode, UsageError
from hpctrain.utils.streams import write_out
from hpctrain.utils.text import listed, plural

if TYPE_CHECKING:
    from hpctrain.batch.job_script import Job
    from hpctrain.batch.sweep import Pairs, Sweep
    from hpctrain.config import Config


def job(arguments: list[str]) -> int:
    """Print or submit a job script."""
    parser = _job_parser()
    parsed = parser.parse_intermixed_args(arguments)
    if parsed.sites or parsed.lint_site:
        return _sites(parsed.site_file, parsed.lint_site or [])
    if parsed.config is None:
        parser.error("the following arguments are required: config")

    from hpctrain.batch import job_plan, job_script, submission
    from hpctrain.batch.environments import take_snapshot
    from hpctrain.batch.exit_status import read_outcome
    from hpctrain.batch.sweep import write_sweep

    study = _study(parsed)
    wishes = _answered(study.configs[0], vars(parsed), arguments)
    wanted = job_plan.plan(study.configs[0], wishes, study.sweep)
    before = read_outcome(Path(wanted.run_folder))
    if study.sweep is not None and before is not None:
        raise ConfigError(
            f"{wanted.run_folder} holds a run: give the sweep a name of its own, run.name=..."
        )
    lanes = [found for config in study.configs if (found := _lanes(config)) is not None]
    job_plan.check(
        wanted,
        lanes=min(lanes, default=None),
        save_seconds=0.0 if before is None else before.save_seconds,
    )
    if parsed.snapshot:
        taken = take_snapshot(Path(wanted.run_folder), Path(study.configs[0].run.directory))
        wanted = dataclasses.replace(wanted, code=str(taken))
    text = job_script.render(wanted)
    if study.sweep is not None:
        write_sweep(study.sweep)
    _note(job_script.bound(wanted))
    if parsed.output is None and not parsed.submit:
        write_out(text)
        return ExitCode.DONE
    path = Path(wanted.script)
    submission.write(path, text)
    if parsed.submit:
        arrays = [submission.Array()]
        if study.sweep is not None:
            elements = _elements_to_submit(wanted, study)
            if not elements:
                return ExitCode.DONE
            arrays = submission.arrays_of(wanted, elements)
        jobs = submission.submit(path, wanted.scheduler, wanted.chain, arrays)
        if study.sweep is not None:
            named = submission.element_jobs(wanted.scheduler, arrays, jobs)
            points = {each: each // wanted.pack for each in study.numbers}
            write_sweep(
                study.sweep.with_jobs(
                    {each: named[part] for each, part in points.items() if part in named}
                )
            )
        write_out("".join(f"{item}\n" for item in jobs))
    return ExitCode.DONE


def _job_parser() -> Parser:
    from hpctrain.config.schema_job import CONTAINERS

    parser = Parser("job")
    parser.take_config(may_lack=True)
    parser.add_argument("--scheduler", choices=SCHEDULERS)
    parser.add_argument("--container", choices=CONTAINERS)
    for option in ("site", "site-file", "account", "queue", "qos", "constraint", "memory", "mail"):
        parser.add_argument(f"--{option}")
    for option in ("time", "environment", "conda", "venv", "image"):
        parser.add_argument(f"--{option}")
    for option, key in (("directive", "directives"), ("module", "modules"), ("bind", "binds")):
        parser.add_argument(f"--{option}", action="append", dest=key)
    for option in ("setup", "env", "sweep"):
        parser.add_argument(f"--{option}", action="append")
    for option in ("nodes", "ranks-per-node", "cpus-per-rank", "chain", "max-jobs"):
        parser.add_argument(f"--{option}", type=count)
    for option in ("throttle", "pack"):
        parser.add_argument(f"--{option}", type=count)
    parser.add_argument("--sweep-file", type=Path)
    parser.add_argument("--max-node-hours", type=hours)
    parser.add_argument("--gpus-per-node", type=number)
    parser.add_argument("--output", type=Path)
    for option in ("submit", "snapshot", "sites"):
        parser.add_argument(f"--{option}", action="store_true")
    parser.add_argument("--lint-site", type=Path, action="append")
    return parser


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Study:
    """What a command line is to train: one run, or the points of a sweep.

    Attributes:
        configs: of the run, or of each point that is asked for.
        sweep: with all points, also those of command lines before; None: one run.
        numbers: of the points that are asked for.
    """

    configs: list[Config]
    sweep: Sweep | None = None
    numbers: list[int] = dataclasses.field(default_factory=list)


def _study(parsed: Any) -> _Study:
    """Return what a command line is to train, the config of each point checked.

    Raises:
        UsageError: if it names no points.
        ConfigError: if the config of one of them is wrong.
    """
    from hpctrain.config import load

    if not parsed.sweep and parsed.sweep_file is None:
        return _Study(configs=[load(parsed.config, parsed.overrides)])
    from hpctrain.batch.sweep import asked_points, numbers_of, with_new_points

    points = asked_points(parsed.sweep or (), parsed.sweep_file)
    own = {text.partition("=")[0].strip() for text in parsed.overrides}
    for text in points[0]:
        if (key := text.partition("=")[0]) in own:
            raise UsageError(f"{key} is swept, and set beside it: leave out one of the two")
    configs = _loaded(parsed, points)
    folder = Path(configs[0].run.directory, configs[0].run.name)
    sweep = with_new_points(folder, (parsed.config, *parsed.overrides), points)
    return _Study(configs=configs, sweep=sweep, numbers=numbers_of(sweep, points))


def _loaded(parsed: Any, points: Sequence[Pairs]) -> list[Config]:
    """Return the config of each point.

    Raises:
        ConfigError: if one of them is wrong, or two come to the same.
    """
    from hpctrain.config import load, to_toml

    configs = []
    seen: dict[str, Pairs] = {}
    for point in points:
        try:
            config = load(parsed.config, [*parsed.overrides, *point])
        except ConfigError as error:
            raise ConfigError(f"point {' '.join(point)} of the sweep: {error}") from error
        before = seen.setdefault(to_toml(config), point)
        if before is not point:
            raise ConfigError(
                f"points {' '.join(before)} and {' '.join(point)} of the sweep are the same run"
            )
        configs.append(config)
    if any(_is_argument(text) for point in points for text in point):
        _check_arguments(parsed, points, configs)
    return configs


def _is_argument(override: str) -> bool:
    """Tell whether an override sets an argument of a component, which only its signature knows."""
    from hpctrain.config.validate import reserved_keys

    section, name = override.partition("=")[0].split(".")[:2]
    return name not in reserved_keys(section)


def _check_arguments(parsed: Any, points: Sequence[Pairs], configs: Sequence[Config]) -> None:
    """Check arguments of components against their signatures, where the job's Python is this one.

    Raises:
        ConfigError: if one of them fits none.
    """
    from importlib.util import find_spec

    from hpctrain.batch.environments import KINDS

    brings = (*KINDS, "setup", "modules")
    is_elsewhere = any(getattr(parsed, key) or getattr(configs[0].job, key) for key in brings)
    if is_elsewhere or find_spec("torch") is None:
        _note("arguments of components are checked when a point begins: its Python is another one")
        return
    from hpctrain.training.components import resolve_components

    for point, config in zip(points, configs, strict=True):
        try:
            resolve_components(config, parsed.config, [*parsed.overrides, *point])
        except ConfigError as error:
            raise ConfigError(f"point {' '.join(point)} of the sweep: {error}") from error


def _elements_to_submit(wanted: Job, study: _Study) -> list[int]:
    """Return the elements of the array whose points are neither complete nor running."""
    from hpctrain.batch.exit_status import read_outcome

    sweep = study.sweep
    assert sweep is not None
    wait = _points_in_queue(sweep, wanted.scheduler, study.numbers)
    states: dict[str, list[int]] = {"complete": [], "waiting or running": [], "to submit": []}
    for each in study.numbers:
        outcome = read_outcome(sweep.run_of(sweep.points[each]))
        is_complete = outcome is not None and outcome.code == ExitCode.DONE
        state = "waiting or running" if each in wait else "to submit"
        states["complete" if is_complete else state].append(each)
    counts = [f"{len(numbers)} {state}" for state, numbers in states.items() if numbers]
    names = listed([sweep.points[each].name for each in states["to submit"]])
    last = f" ({names})" if names else "; nothing is submitted"
    _note(f"{plural(len(study.numbers), 'point')}: {', '.join(counts)}{last}")
    return sorted({each // wanted.pack for each in states["to submit"]})


def _points_in_queue(sweep: Sweep, scheduler: str, numbers: Sequence[int]) -> set[int]:
    """Return the points that a job waits or runs for: as the scheduler says, else as they seem."""
    from hpctrain.batch.exit_status import read_outcome
    from hpctrain.batch.scheduler import live_jobs
    from hpctrain.checkpoint.lease import holder_lives
    from hpctrain.watch.run_files import runs_now

    jobs: dict[int, set[str]] = {}
    for each in numbers:
        outcome = read_outcome(sweep.run_of(sweep.points[each]))
        name, _, last = (outcome.job if outcome and outcome.job else "").partition(" ")
        # exit.json has the start of the job behind its name.
        last = last.rpartition(".")[0] if name == scheduler else ""
        jobs[each] = {job for job in (sweep.points[each].job, last) if job}
    known = set().union(*jobs.values())
    live = live_jobs(scheduler, known, os.environ) if known else set()
    if live is not None:
        return {each for each, own in jobs.items() if own & live}
    runs = {each: sweep.run_of(sweep.points[each]) for each in numbers}
    return {each for each, run in runs.items() if runs_now(run, holder_lives(run))}


def _note(line: str) -> None:
    print(f"hpctrain: {line}", file=sys.stderr)  # noqa: T201


def _sites(site_file: str | None, linted: list[Path]) -> int:
    """List the sites that are known, or say what is wrong with files of sites."""
    from hpctrain.batch.sites import load_site, load_sites, missing_sources, site_table

    if not linted:
        write_out(site_table(load_sites(site_file).values()))
        return ExitCode.DONE
    problems = [
        f"{path}: {problem}\n" for path in linted for problem in missing_sources(load_site(path))
    ]
    write_out("".join(problems) or f"{len(linted)} site files, nothing wrong\n")
    return ExitCode.CONFIG if problems else ExitCode.DONE


def _answered(config: Config, wishes: dict[str, Any], arguments: list[str]) -> dict[str, Any]:
    """Return the wishes of a command line; what is missing a person at a terminal is asked for."""
    from hpctrain.batch.sites import load_sites, site_of_host

    asked = config.job
    is_placed = any((wishes["site"], wishes["site_file"], wishes["scheduler"]))
    is_placed = is_placed or any((asked.site, asked.site_file, asked.scheduler))
    missing = [name for name in ("nodes", "time") if not (wishes[name] or getattr(asked, name))]
    if is_placed or not (sys.stdin.isatty() and sys.stderr.isatty()):
        return wishes
    sites = load_sites()
    here = site_of_host(sites.values())
    usual = {"site": here.name if here else "slurm", "nodes": "1", "time": "1:00:00"}
    words = {
        "site": f"Site or scheduler ({', '.join((*sites, *SCHEDULERS))})",
        "nodes": "Nodes",
        "time": "Time of each job, hours:minutes:seconds",
    }
    answers = dict(wishes)
    for name in ("site", *missing):
        print(f"{words[name]} [{usual[name]}]: ", end="", file=sys.stderr, flush=True)  # noqa: T201
        answer = sys.stdin.readline().strip() or usual[name]
        option = "scheduler" if name == "site" and answer in SCHEDULERS else name
        answers[option] = count(answer) if name == "nodes" and answer.isdecimal() else answer
        arguments = [*arguments, f"--{option}", answer]
    if not isinstance(answers["nodes"], int | None):
        raise UsageError(f"--nodes {answers['nodes']!a}: expected a number from 1 on")
    print(f"{PROGRAM} job {shlex.join(arguments)}", file=sys.stderr)  # noqa: T201
    return answers


def _lanes(config: Config) -> int | None:
    """Return how many ranks can train; None: any number, or a DataLoader is to say."""
    from hpctrain.config.limits import is_shuffled
    from hpctrain.data.order.order import default_lanes

    data = config.data
    if data.weights is not None or not is_shuffled(data, config.training):
        return None
    if data.lanes is None and not data.global_batch_size:
        return None
    return data.lanes or default_lanes(data.global_batch_size)
