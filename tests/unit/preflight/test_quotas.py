"""Quotas as the commands of file systems print them, and what they leave for checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpctrain.preflight import quotas as quotas_module
from hpctrain.preflight.quotas import (
    Quota,
    Quotas,
    judge_quotas,
    quotas_of_mmlsquota,
    quotas_of_table,
    read_quotas,
)
from hpctrain.utils.files import Mount

KB, MB = 1024, 10**6

# As quota 4.06 prints it for a user over one of two limits.
QUOTA = """\
Disk quotas for user nobody (uid 65534):\x20
     Filesystem  blocks   quota   limit   grace   files   quota   limit   grace
     /dev/loop0    1200*   1000    2000 1796552035       3      10      20       0
     /dev/sdb1       44       0       0       0       9       0       0       0
"""
NONE = "Disk quotas for user root (uid 0): none\n"
LUSTRE = """\
Disk quotas for usr jo (uid 1000):
     Filesystem    kbytes    quota   limit   grace   files   quota   limit   grace
          /fred [1041408]  5242880 6291456       -     [0]       0       0       -
uid 1000 is using default file quota setting
Disk quotas for prj 7 (pid 7):
     Filesystem  kbytes   quota   limit   grace   files   quota   limit   grace
      /fred      982177580*      0 900000000       - 443208230 0      500000000       -
"""
GPFS = """\
mmlsquota::HEADER:version:reserved:reserved:filesystemName:quotaType:id:name:blockUsage:blockQuota:\
blockLimit:blockInDoubt:blockGrace:filesUsage:filesQuota:filesLimit:filesInDoubt:filesGrace:remarks:
mmlsquota::0:1:::gpfs01:USR:1000:jo:120:1000:2000:0:none:15:0:0:0:none::
mmlsquota::0:1:::gpfs02:USR:1000:jo:1:2:3:0:none:4:5:6:0:none::
mmlsquota::0:1:::gpfs01:GRP:50:lab:7:0:0:0:none:8:90:100:0:none::
"""


def told(found: object) -> list[str]:
    assert hasattr(found, "__iter__")
    return [
        f"{each.whose} {each.used_bytes // KB}/{(each.most_bytes or 0) // KB} "
        f"{each.used_files}/{each.most_files or 0}"
        for each in found
    ]


def test_quota() -> None:
    assert told(quotas_of_table(QUOTA, ("/dev/loop0", "/mnt"))) == ["user nobody 1200/2000 3/20"]
    assert told(quotas_of_table(NONE)) == []


def test_lfs_quota() -> None:
    assert told(quotas_of_table(LUSTRE)) == [
        "user jo 1041408/6291456 0/0",
        "project 7 982177580/900000000 443208230/500000000",
    ]


def test_mmlsquota() -> None:
    found = told(quotas_of_mmlsquota(GPFS, "gpfs01"))
    assert found == ["user jo 120/2000 15/0", "group lab 7/0 8/100"]


@pytest.mark.parametrize("text", ["", "what\n", "mmlsquota::0:1:::a:USR\n", "\0:::::\n" * 9])
def test_what_is_none(text: str) -> None:
    assert told(quotas_of_table(text)) == told(quotas_of_mmlsquota(text, "a")) == []


def quota(most_bytes: int | None = None, most_files: int | None = None) -> Quota:
    return Quota(
        whose="user jo",
        used_bytes=10 * MB,
        used_files=100,
        most_bytes=most_bytes,
        most_files=most_files,
    )


@pytest.mark.parametrize(
    ("found", "status", "words"),
    [
        ((), "pass", "quota tells of none"),
        ((quota(100 * MB),), "pass", "user jo: 10.0 MB of 100 MB (quota)"),
        ((quota(100 * MB), quota(None, 1000)), "pass", "100 of 1,000 files"),
        ((quota(None, 123),), "warn", "4 checkpoints need 24 files and 40.0 MB"),
        ((quota(None, 105),), "fail", "100 of 105 files"),
        ((quota(45 * MB),), "warn", "10.0 MB of 45.0 MB"),
        ((quota(19 * MB, 1000),), "fail", "10.0 MB of 19.0 MB, 100 of 1,000 files"),
    ],
)
def test_what_they_leave(found: tuple[Quota, ...], status: str, words: str) -> None:
    finding = judge_quotas(Quotas(command="quota", found=found), 10 * MB, 6, kept=3)
    assert (finding.status, words in finding.fact) == (status, True), finding


@pytest.mark.parametrize(
    ("filesystem", "shims", "expected"),
    [
        ("ext4", {"quota": f"cat <<'E'\n{QUOTA}E\nexit 1"}, ["user nobody 1200/2000 3/20"]),
        (
            "lustre",
            {
                "lfs": "[[ $1 == project ]] && { echo '    7 P '; exit; }\n"
                f"[[ $2 == -p && $3 == 7 ]] && cat <<'E'\n{LUSTRE}E\nexit 0"
            },
            ["user jo 1041408/6291456 0/0", "project 7 982177580/900000000 443208230/500000000"],
        ),
        (
            "gpfs",
            {"mmlsquota": f"cat <<'E'\n{GPFS}E"},
            ["user jo 120/2000 15/0", "group lab 7/0 8/100"],
        ),
    ],
)
def test_commands_are_asked(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    filesystem: str,
    shims: dict[str, str],
    expected: list[str],
) -> None:
    for name, body in shims.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n", encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    source = "/dev/gpfs01" if filesystem == "gpfs" else "/dev/loop0"
    monkeypatch.setattr(quotas_module, "mount_of", lambda _: Mount(filesystem, source, "/fred"))
    quotas = read_quotas(tmp_path, {"PATH": f"{tmp_path}:/usr/bin:/bin"})
    assert quotas.problem == ""
    assert told(quotas.found) == expected
    nobody = read_quotas(tmp_path, {"PATH": "/nowhere"})
    assert nobody.problem.endswith("is not installed here")
    assert judge_quotas(nobody, None, 6, kept=3).status == "skip"
