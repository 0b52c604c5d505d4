"""Quotas of a folder's file system, bytes and files, as that file system's command tells them."""

from __future__ import annotations

import grp
import os
import pwd
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from hpctrain.batch.scheduler import ask
from hpctrain.preflight.report import Finding
from hpctrain.utils.files import mount_of
from hpctrain.utils.text import listed, plural, printable, size

_KB = 1024
_MOST_GROUPS = 4
_OVER = 1
"""Exit code of quota for a user that is over one of them, and for one that has none."""

# Used, soft, hard, grace; of bytes in kB, then of files. A star: over; in brackets: not up to date.
_NUMBERS = r"\s+\[?(\d+)\]?\*?\s+(\d+)\s+(\d+)\s+(\S+)"
_ROW = re.compile(r"^\s*(?P<filesystem>\S+)" + 2 * _NUMBERS + r"\s*$", re.MULTILINE)
_WHOSE = re.compile(r"Disk quotas for (?P<kind>\w+) (?P<name>\S+) \(\w+ \d+\)")
_KINDS = {"usr": "user", "grp": "group", "prj": "project", "fileset": "fileset"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Quota:
    """What somebody may have on a file system; None is no limit.

    Attributes:
        whose: such as "user jo" or "project 7".
        used_bytes, used_files: what there is.
        most_bytes, most_files: the hard limit, else the soft one, beyond which time runs out.
    """

    whose: str
    used_bytes: int
    used_files: int
    most_bytes: int | None
    most_files: int | None

    @property
    def has_limit(self) -> bool:
        return self.most_bytes is not None or self.most_files is not None

    def __str__(self) -> str:
        bounds = [
            f"{size(self.used_bytes)} of {size(self.most_bytes)}" if self.most_bytes else "",
            f"{self.used_files:,} of {plural(self.most_files, 'file')}" if self.most_files else "",
        ]
        return printable(f"{self.whose}: {', '.join(filter(None, bounds))}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Quotas:
    """What the command of a file system has said.

    Attributes:
        command: that was asked; empty: none is known.
        found: the quotas that have a limit.
        problem: why nothing is known; empty where it is.
    """

    command: str
    found: tuple[Quota, ...] = ()
    problem: str = ""


def read_quotas(folder: Path, environ: Mapping[str, str] = os.environ) -> Quotas:
    """Return the quotas that bound what this user writes to a folder.

    Each question may take a while; for one rank.
    """
    mount = mount_of(folder)
    user = pwd_name()
    if mount.filesystem == "lustre":
        return _of_lustre(folder, user, mount.place, environ)
    if mount.filesystem == "gpfs":
        text, problem = ask(("mmlsquota", "-Y"), environ)
        device = Path(mount.source).name
        return _reported("mmlsquota", quotas_of_mmlsquota(text, device), problem)
    # With the numbers of grace no column is ever empty, and no line is cut in two.
    question = ("quota", "-w", "-p", "-u", "-g", "-f", mount.place)
    text, problem = ask(question, environ, codes=(0, _OVER))
    return _reported("quota", quotas_of_table(text, (mount.source, mount.place)), problem)


def quotas_of_table(text: str, filesystems: tuple[str, ...] = ()) -> Iterator[Quota]:
    """Read tables of `lfs quota` and `quota -w -p`.

    Source: lfs-quota(1) of Lustre 2.15; quota(1) of quota 4.06, seen.

    Args:
        text: all that was printed.
        filesystems: names of the one that counts; none: all do.
    """
    whose = "user"
    for line in text.splitlines():
        if (heading := _WHOSE.match(line.strip())) is not None:
            whose = f"{_KINDS.get(heading['kind'], heading['kind'])} {heading['name']}"
        row = _ROW.match(line)
        if row is None or (filesystems and row["filesystem"] not in filesystems):
            continue
        numbers = row.groups()[1:]
        yield Quota(
            whose=whose,
            used_bytes=int(numbers[0]) * _KB,
            most_bytes=_limit(numbers[1], numbers[2], _KB),
            used_files=int(numbers[4]),
            most_files=_limit(numbers[5], numbers[6]),
        )


def quotas_of_mmlsquota(text: str, device: str) -> Iterator[Quota]:
    """Read `mmlsquota -Y`: fields by colons, named by a line of their own.

    Source: IBM Storage Scale 5.1, command reference, mmlsquota; not seen on a cluster.

    Args:
        text: all that was printed.
        device: name of the file system.
    """
    names: list[str] = []
    for line in text.splitlines():
        fields = line.split(":")
        if len(fields) < 3 or fields[0] != "mmlsquota":
            continue
        if fields[2] == "HEADER":
            names = fields
            continue
        row = dict(zip(names, fields, strict=False))
        with suppress(KeyError, ValueError):
            if row["filesystemName"] != device:
                continue
            kind = {"USR": "user", "GRP": "group", "FILESET": "fileset"}[row["quotaType"]]
            yield Quota(
                whose=f"{kind} {row.get('name') or row.get('filesetname', '')}".strip(),
                used_bytes=int(row["blockUsage"]) * _KB,
                most_bytes=_limit(row["blockQuota"], row["blockLimit"], _KB),
                used_files=int(row["filesUsage"]),
                most_files=_limit(row["filesQuota"], row["filesLimit"]),
            )


def judge_quotas(
    quotas: Quotas, checkpoint_bytes: int | None, checkpoint_files: int, kept: int
) -> Finding:
    """Compare what quotas leave with the checkpoints that are kept, and one in the making.

    Args:
        quotas: of the run folder's file system.
        checkpoint_bytes: of one checkpoint; None: no model could be built.
        checkpoint_files: of one checkpoint.
        kept: checkpoints that stay.
    """
    name = "quota"
    if not quotas.found:
        why = quotas.problem or f"{quotas.command} tells of none"
        return Finding(name=name, status="skip" if quotas.problem else "pass", fact=why)
    each = checkpoint_bytes or 0
    worst = "pass"
    for quota in quotas.found:
        left = [
            (quota.most_bytes, quota.used_bytes, each),
            (quota.most_files, quota.used_files, checkpoint_files),
        ]
        for most, used, needed in left:
            if most is not None and most - used < needed:
                worst = "fail"
            elif most is not None and most - used < (kept + 1) * needed and worst == "pass":
                worst = "warn"
    needs = "" if checkpoint_bytes is None else f" and {size((kept + 1) * each)}"
    fact = (
        f"{listed(list(map(str, quotas.found)), 4)} ({quotas.command}); {kept + 1} checkpoints "
        f"need {plural((kept + 1) * checkpoint_files, 'file')}{needs}"
    )
    values = {
        "quotas": [
            {
                "whose": quota.whose,
                "used_bytes": quota.used_bytes,
                "most_bytes": quota.most_bytes,
                "used_files": quota.used_files,
                "most_files": quota.most_files,
            }
            for quota in quotas.found
        ]
    }
    if worst == "pass":
        return Finding(name=name, status="pass", fact=fact, values=values)
    return Finding(
        name=name,
        status="fail" if worst == "fail" else "warn",
        fact=fact,
        fix="remove what is not needed, ask for more, set run.directory elsewhere, or lower "
        "checkpoint.keep_last",
        values=values,
    )


def pwd_name() -> str:
    """Return the name of this user; its number where that has none, as in containers."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())


def _of_lustre(folder: Path, user: str, place: str, environ: Mapping[str, str]) -> Quotas:
    """Ask for the user, the groups and the folder's project, which Lustre tells one by one."""
    whose = [("-u", user)]
    for number in list(dict.fromkeys([os.getegid(), *os.getgroups()]))[:_MOST_GROUPS]:
        with suppress(KeyError):
            whose.append(("-g", grp.getgrgid(number).gr_name))
    text, _ = ask(("lfs", "project", "-d", str(folder)), environ)
    project = re.match(r"\s*(\d+)\s", text)
    if project is not None and int(project[1]):
        whose.append(("-p", project[1]))
    found: list[Quota] = []
    problems = []
    for option, name in whose:
        text, problem = ask(("lfs", "quota", option, name, place), environ)
        found += quotas_of_table(text)
        problems += [problem] if problem else []
    return _reported("lfs quota", iter(found), problems[0] if len(problems) == len(whose) else None)


def _reported(command: str, found: Iterator[Quota], problem: str | None) -> Quotas:
    if problem is not None:
        return Quotas(command=command, problem=f"{command} {problem}")
    return Quotas(command=command, found=tuple(quota for quota in found if quota.has_limit))


def _limit(soft: str, hard: str, unit: int = 1) -> int | None:
    """Return a limit; 0 stands for none."""
    most = int(hard) or int(soft)
    return most * unit if most else None
