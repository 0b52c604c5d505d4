"""Sites: what a machine wants in a job script, one TOML file each, from several places.

Those that come with hpctrain say where each fact is from, and when that was looked at. A file is
code: its lines become part of job scripts. So one that somebody else than you and root can change
is not read. The site's scheduler has the last word on all limits.
"""

from __future__ import annotations

import fnmatch
import json
import os
import re
import socket
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge, Gt, MinLen

from hpctrain.batch.quoting import plain_value, require_line
from hpctrain.config.messages import dotted
from hpctrain.config.schema_job import Scheduler
from hpctrain.config.toml import Source as Toml
from hpctrain.config.toml import parse, read
from hpctrain.errors import ConfigError, UsageError
from hpctrain.utils.text import did_you_mean, listed, plural, table

SYSTEM = Path("/etc/hpctrain/sites.d")

_DATE = re.compile(r"20\d\d(-\d\d(-\d\d)?)?")
_EXPORT = re.compile(r"[A-Za-z_]\w*(=|; \w+=).*")
_PLACEHOLDER = re.compile(r"(?<!\$)\{(\w*)\}")
_PLACEHOLDERS = {"nodes", "ranks", "ranks_per_node", "cpus"}
_FACTS = ("queues", "directives", "modules", "image_modules", "exports", "launcher")
_FORBID = {"extra": "forbid"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Because:
    """A line of a script, and why it is there."""

    __pydantic_config__ = _FORBID
    line: Annotated[str, MinLen(1)]
    reason: Annotated[str, MinLen(1)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """Jobs of at most so many nodes may take at most so many hours; no nodes: any number."""

    __pydantic_config__ = _FORBID
    hours: Annotated[float, Gt(0)]
    nodes: Annotated[int, Ge(1)] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Queue:
    """A partition, queue or quality of service.

    Attributes:
        limits: hours by number of nodes, ascending; the first that holds a job counts; empty: not
            known.
        fewest_nodes: smallest number of nodes that a job may have.
    """

    __pydantic_config__ = _FORBID
    name: Annotated[str, MinLen(1)]
    limits: tuple[Limit, ...] = ()
    fewest_nodes: Annotated[int, Ge(1)] = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where facts are from.

    Attributes:
        source: address of a page, or words.
        date: when it was looked at: a year, a month or a day.
        facts: "nodes", or keys of the site.
    """

    __pydantic_config__ = _FORBID
    source: Annotated[str, MinLen(1)]
    date: str
    facts: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """One machine.

    Attributes:
        hosts: patterns of the names of its login nodes.
        retired: that it is switched off, in words.
        queues: the first is the one that a job goes to.
        queue_option: option that names it to the scheduler.
        gpus_per_node: number that the scheduler is asked for; None: in the site's own `directives`.
        directives: lines for the scheduler, without their prefix; {nodes} is the number of nodes.
        modules: commands that bring what NCCL or RCCL lacks, to ranks that run in no image.
        image_modules: the same for ranks in an image.
        exports: variables, without the word export.
        launcher: options of the launcher that bind ranks; {cpus} is the CPUs of a rank.
        container_gpus: option of Apptainer that brings the GPUs into a container; empty: none.
        shifter_modules: of Shifter, which bring GPUs and network into one.
    """

    __pydantic_config__ = _FORBID
    name: Annotated[str, MinLen(1)]
    title: Annotated[str, MinLen(1)]
    scheduler: Scheduler
    hosts: tuple[str, ...] = ()
    retired: str = ""
    ranks_per_node: Annotated[int, Ge(1)]
    cpus_per_rank: Annotated[int, Ge(1)]
    gpus_per_node: Annotated[int, Ge(0)] | None = None
    queues: tuple[Queue, ...] = ()
    queue_option: str = ""
    directives: tuple[Because, ...] = ()
    modules: tuple[Because, ...] = ()
    image_modules: tuple[Because, ...] = ()
    exports: tuple[Because, ...] = ()
    launcher: Because | None = None
    notes: tuple[str, ...] = ()
    container_gpus: Literal["--nv", "--rocm", ""] = "--nv"
    shifter_modules: str = ""
    sources: tuple[Source, ...] = ()

    @property
    def queue(self) -> str | None:
        """Queue of a job that names none."""
        return self.queues[0].name if self.queues else None

    @property
    def cited(self) -> str:
        """All sources in a line."""
        return "; ".join(f"{item.source} ({item.date})" for item in self.sources)

    def find_queue(self, name: str | None) -> Queue | None:
        """Return what is known of a queue; None names the usual one."""
        wanted = name or self.queue
        return next((queue for queue in self.queues if queue.name == wanted), None)


def user_folder() -> Path:
    """Return where a user keeps site files."""
    home = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(home, "hpctrain", "sites.d")


def load_sites(site_file: str | Path | None = None) -> dict[str, Site]:
    """Return all sites by name; of two of a name the nearer to the user counts.

    Args:
        site_file: of one more, which counts before all others.

    Raises:
        ConfigError: if a file is none of a site, with every problem.
    """
    found = {site.name: site for site in built_in_sites()}
    for folder in (SYSTEM, user_folder()):
        for path in sorted(folder.glob("*.toml")):
            site = load_site(path)
            found[site.name] = site
    if site_file is not None:
        site = load_site(Path(site_file))
        found[site.name] = site
    return found


def built_in_sites() -> Iterator[Site]:
    """Yield the sites that come with hpctrain, by name."""
    folder = resources.files("hpctrain.batch") / "site_files"
    for item in sorted(folder.iterdir(), key=lambda item: item.name):
        if item.name.endswith(".toml"):
            yield _site(parse(item.read_text(encoding="utf-8"), item.name))


def load_site(path: Path) -> Site:
    """Return the site of a file.

    Raises:
        ConfigError: if the file is none of a site, or somebody else may have written it.
    """
    _require_own(path)
    return _site(read(str(path)))


def find_site(name: str, site_file: str | Path | None = None) -> Site:
    """Return a site by its name.

    Raises:
        UsageError: if there is none.
        ConfigError: if a site file is wrong.
    """
    sites = load_sites(site_file)
    if name in sites:
        return sites[name]
    raise UsageError(
        f"--site {name}: not known{did_you_mean(name, sites)}; known are {', '.join(sites)}. Leave "
        "it out for a generic one, or write a file of your own: docs/sites.md"
    )


def site_of_host(sites: Iterable[Site], names: Sequence[str] | None = None) -> Site | None:
    """Return the site that a login node of one of these names belongs to, None: not known.

    Args:
        sites: to choose from.
        names: of the host; None: of this one.
    """
    if names is None:
        names = (socket.gethostname(), socket.getfqdn())
    return next(
        (
            site
            for site in sites
            if any(fnmatch.fnmatch(name, pattern) for name in names for pattern in site.hosts)
        ),
        None,
    )


def longest_hours(queue: Queue, nodes: int) -> float | None:
    """Return how long a job of so many nodes may take, None if it may not run at all."""
    return next(
        (limit.hours for limit in queue.limits if limit.nodes is None or nodes <= limit.nodes), None
    )


def site_table(sites: Iterable[Site]) -> str:
    """Return a list of sites for people, a line for each queue."""
    rows = [("site", "scheduler", "queue", "GPUs a node", "limits", "machine")]
    for site in sites:
        machine = f"{site.title}; {site.retired}" if site.retired else site.title
        for number, queue in enumerate(site.queues or (Queue(name="-"),)):
            gpus = "its own lines" if site.gpus_per_node is None else str(site.gpus_per_node)
            head = (site.name, site.scheduler) if number == 0 else ("", "")
            tail = (gpus, _limits(queue), machine if number == 0 else "")
            rows.append((*head, queue.name, *tail))
    return "".join(f"{line.rstrip()}\n" for line in table(rows))


def _limits(queue: Queue) -> str:
    fewest = f"from {queue.fewest_nodes} nodes on; " if queue.fewest_nodes > 1 else ""
    parts = [
        f"{limit.hours:g} h" + ("" if limit.nodes is None else f" to {plural(limit.nodes, 'node')}")
        for limit in queue.limits
    ]
    return fewest + (", ".join(parts) or "not known")


def missing_sources(site: Site) -> list[str]:
    """Return which facts of a site have no source, a line for each, and which dates are none."""
    cited = {fact for source in site.sources for fact in source.facts}
    needed = ["nodes", *(fact for fact in _FACTS if getattr(site, fact))]
    problems = [f"{fact}: no [[sources]] names it" for fact in needed if fact not in cited]
    known = {"nodes", "notes", "hosts", *_FACTS}
    for source in site.sources:
        if not _DATE.fullmatch(source.date):
            problems.append(f'sources: date "{source.date}" is not one such as "2026-05"')
        problems += [
            f"sources: {fact} is not a fact of a site{did_you_mean(fact, known)}"
            for fact in source.facts
            if fact not in known
        ]
    return problems


def _require_own(path: Path) -> None:
    """Refuse a file that somebody else than this user and root can change.

    Raises:
        ConfigError: naming why.
    """
    try:
        facts = path.stat()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    why = ""
    if facts.st_uid not in (0, os.geteuid()):
        why = f"belongs to user {facts.st_uid}"
    elif stat.S_IMODE(facts.st_mode) & 0o002:
        why = "can be written by everybody"
    if why:
        raise ConfigError(
            f"{path}: a site file is code that your jobs run, and this one {why}: copy it, look "
            "into it, and keep it to yourself (chmod o-w)"
        )


def _site(toml: Toml) -> Site:
    """Return a parsed site, every line of it fit for a script.

    Raises:
        ConfigError: with every problem, each with its line.
    """
    from pydantic import TypeAdapter, ValidationError

    problems: list[str] = []
    site: Site | None = None
    try:
        site = TypeAdapter(Site).validate_json(json.dumps(toml.table, default=str), strict=True)
    except ValidationError as error:
        for item in error.errors(include_url=False, include_context=False, include_input=False):
            key = tuple(str(part) for part in item["loc"])
            problems.append(f"{_place(toml, key)}{dotted(key)}: {item['msg']}")
    else:
        problems = [f"{_place(toml, key)}{problem}" for key, problem in _unfit(site)]
    if site is None or problems:
        lines = "".join(f"\n  {problem}" for problem in problems)
        count = plural(len(problems), "problem")
        raise ConfigError(f"{toml.path}: {count} of a site file (docs/sites.md):{lines}")
    return site


def _place(toml: Toml, key: tuple[str, ...]) -> str:
    for end in range(len(key), 0, -1):
        if (line := toml.lines.get(key[:end])) is not None:
            return f"line {line}: "
    return ""


def _unfit(site: Site) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield key and words of all that may not stand in a script, or makes no sense."""
    for key in ("name", "queue_option", "shifter_modules"):
        value = getattr(site, key)
        if value and (problem := _refused(plain_value, value.lstrip("-"), key)):
            yield (key,), problem
    for text in (site.title, site.retired, *site.notes, *(site.cited,)):
        if text and (problem := _refused(require_line, text, "the text")):
            yield (), problem
    for queue in site.queues:
        if problem := _refused(plain_value, queue.name, "queue"):
            yield ("queues",), problem
        if not _ascends(queue.limits):
            yield ("queues",), f"limits of {queue.name} are to ascend in nodes"
    lines = [(key, item) for key in _FACTS[1:5] for item in getattr(site, key)]
    if site.launcher is not None:
        lines.append(("launcher", site.launcher))
    for key, item in lines:
        yield from (((key,), problem) for problem in _unfit_line(key, item))


def _unfit_line(key: str, item: Because) -> Iterator[str]:
    """Yield in words why a line may not stand in a script."""
    for text in (item.line, item.reason):
        if problem := _refused(require_line, text, key):
            yield problem
    unknown = set(_PLACEHOLDER.findall(item.line)) - _PLACEHOLDERS
    if key in ("directives", "launcher") and unknown:
        yield f"{{{unknown.pop()}}} is not one of {listed(sorted(_PLACEHOLDERS))}: {item.line}"
    if key == "directives" and (not item.line.startswith("-") or "#" in item.line):
        yield f"a directive begins with - and holds no #: {item.line}"
    if key == "exports" and not _EXPORT.fullmatch(item.line):
        yield f"expected NAME=VALUE, without the word export: {item.line}"


def _ascends(limits: Sequence[Limit]) -> bool:
    nodes = [float("inf") if limit.nodes is None else limit.nodes for limit in limits]
    return nodes == sorted(set(nodes))


def _refused(check: Callable[[str, str], object], text: str, what: str) -> str | None:
    """Return why a check refuses a text, None if it does not."""
    try:
        check(text, what)
    except UsageError as error:
        return str(error)
    return None
