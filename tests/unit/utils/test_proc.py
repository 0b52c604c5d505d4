"""Processes in /proc as they are, and limits of control groups, of every level and version."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import pytest
from helpers.limits import JOB_SECONDS

from hpctrain.utils import proc
from hpctrain.utils.proc import cgroup_folders, cpu_quotas, memory_limits, num_oom_kills


def test_a_name_may_hold_brackets_blanks_and_line_feeds(tmp_path: Path) -> None:
    (tmp_path / "7").mkdir()
    stat = "7 (a) S 1) (b\n c) R 5 7 7 0 -1 4194304"
    (tmp_path / "7" / "stat").write_text(stat, encoding="utf-8")
    assert proc.name_of(7, tmp_path) == "a) S 1) (b\n c"
    assert proc.stat_fields(7, tmp_path)[proc.STATE] == "R"
    assert proc.parent_of(7, tmp_path) == 5
    assert list(proc.ancestors(7, tmp_path)) == [5]


def test_what_is_not_there_is_nothing(tmp_path: Path) -> None:
    assert proc.stat_fields(8, tmp_path) == []
    assert proc.name_of(8, tmp_path) == ""
    assert proc.parent_of(8, tmp_path) == 0
    assert list(proc.ancestors(8, tmp_path)) == []
    assert proc.start_time(2**22 + 1) is None


def test_this_process() -> None:
    assert next(proc.ancestors()) == os.getppid()
    assert proc.start_time(os.getpid()) == proc.start_time(os.getpid()) is not None


GB = 2**30
V1 = "31 23 0:28 {root} {mount} rw,relatime - cgroup cgroup rw,{controller}\n"
V2 = "30 23 0:26 {root} {mount} rw,relatime shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"


def tree(
    folder: Path, group: str, mounts: list[tuple[str, str, str]], files: Mapping[str, str]
) -> Path:
    """Write a process file system, and below it the groups that it tells of.

    Args:
        folder: for all of it.
        group: content of /proc/self/cgroup.
        mounts: controller ("" of version 2), root, and place below the folder.
        files: of the groups, by their place below the folder.
    """
    proc = folder / "proc"
    (proc / "self").mkdir(parents=True)
    (proc / "self" / "cgroup").write_text(group, encoding="utf-8")
    lines = ["22 1 0:21 / / rw - ext4 /dev/sda rw\n"]
    for controller, root, place in mounts:
        mount = str(folder / place).replace(" ", "\\040")
        line = V1 if controller else V2
        lines.append(line.format(root=root, mount=mount, controller=controller))
    (proc / "self" / "mountinfo").write_text("".join(lines), encoding="utf-8")
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
    return proc


STEP = "0::/system.slice/slurmstepd.scope/job_7/step_0/user/task_0\n"
JOB = "fs/system.slice/slurmstepd.scope/job_7"


@pytest.mark.parametrize(
    ("group", "mounts", "files", "cpus", "limits"),
    [
        pytest.param(
            STEP,
            [("", "/", "fs")],
            {
                f"{JOB}/step_0/user/task_0/cpu.max": "max 100000\n",
                f"{JOB}/step_0/cpu.max": "350000 100000\n",
                f"{JOB}/cpu.max": "400000 100000\n",
                f"{JOB}/step_0/memory.max": "max\n",
                f"{JOB}/step_0/memory.high": "max\n",
                f"{JOB}/memory.max": f"{8 * GB}\n",
                f"{JOB}/memory.high": f"{6 * GB}\n",
                f"{JOB}/memory.current": f"{2 * GB}\n",
                f"{JOB}/memory.stat": f"anon 5\ninactive_file {GB}\n",
            },
            [3.5, 4.0],
            [(6 * GB, GB)],
            id="Slurm, version 2: limits of job and step",
        ),
        pytest.param(
            "0::/\n",
            [("", "/", "a mount")],
            {
                "a mount/cpu.max": "50000 100000\n",
                "a mount/memory.max": f"{GB}\n",
                "a mount/memory.current": "7\n",
            },
            [0.5],
            [(GB, 7)],
            id="Kubernetes, version 2: the container's group is the root of its namespace",
        ),
        pytest.param(
            "0::/../../user.slice\n",
            [("", "/../..", "fs")],
            {"fs/cpu.max": "200000 100000\n"},
            [2.0],
            [],
            id="entered from outside of the namespace",
        ),
        pytest.param(
            "5:memory:/docker/c0ffee\n3:cpu,cpuacct:/docker/c0ffee\n0::/docker/c0ffee\n",
            [("memory", "/docker/c0ffee", "memory"), ("cpu,cpuacct", "/docker/c0ffee", "cpu")],
            {
                "cpu/cpu.cfs_quota_us": "150000\n",
                "cpu/cpu.cfs_period_us": "100000\n",
                "memory/memory.limit_in_bytes": f"{4 * GB}\n",
                "memory/memory.usage_in_bytes": f"{3 * GB}\n",
                "memory/memory.stat": f"total_inactive_file {GB}\n",
            },
            [1.5],
            [(4 * GB, 2 * GB)],
            id="Docker, version 1: the path of the host, the group mounted as the root",
        ),
        pytest.param(
            "4:cpuacct,cpu:/lsf/c1/job.12.3\n2:memory:/lsf/c1/job.12.3\n0::/\n",
            [("cpu,cpuacct", "/", "cpu"), ("memory", "/", "memory"), ("", "/", "unified")],
            {
                "unified/cgroup.procs": "",
                "cpu/lsf/c1/job.12.3/cpu.cfs_quota_us": "-1\n",
                "cpu/lsf/c1/job.12.3/cpu.cfs_period_us": "100000\n",
                "cpu/lsf/cpu.cfs_quota_us": "800000\n",
                "cpu/lsf/cpu.cfs_period_us": "100000\n",
                "memory/lsf/c1/job.12.3/memory.limit_in_bytes": f"{2 * GB}\n",
                "memory/lsf/c1/job.12.3/memory.usage_in_bytes": "9\n",
            },
            [8.0],
            [(2 * GB, 9)],
            id="LSF, both versions at once: a limit far above",
        ),
        pytest.param("", [], {}, [], [], id="not Linux"),
        pytest.param("0::/x\n", [("", "/", "nowhere")], {}, [], [], id="not mounted here"),
        pytest.param(
            "0::/\n",
            [("", "/", "fs")],
            {"fs/cpu.max": "what\n", "fs/memory.max": "0x10\n", "fs/memory.current": ""},
            [],
            [],
            id="files of a kernel to come",
        ),
    ],
)
def test_limits_of_every_level(
    tmp_path: Path,
    group: str,
    mounts: list[tuple[str, str, str]],
    files: dict[str, str],
    cpus: list[float],
    limits: list[tuple[int, int]],
) -> None:
    proc = tree(tmp_path, group, mounts, files)
    assert [quota.cpus for quota in cpu_quotas(proc)] == cpus
    assert [(found.limit, found.used) for found in memory_limits(proc)] == limits


def test_kills_for_memory_are_those_of_the_own_group(tmp_path: Path) -> None:
    files = {f"{JOB}/step_0/user/task_0/memory.events": "oom 3\noom_kill 2\n"}
    assert num_oom_kills(tree(tmp_path, STEP, [("", "/", "fs")], files)) == 2


SAYS = """
import sys
from pathlib import Path

Path(sys.argv[1], "cgroup.procs").write_text("0")
from hpctrain.utils.proc import allowed_cores, cpu_budget, cpu_quotas

print([quota.cpus for quota in cpu_quotas()][:2], cpu_budget(), len(allowed_cores()))
"""


def test_a_group_of_this_machine(tmp_path: Path) -> None:
    """A quota on the group above; the process's own has none."""
    if os.geteuid() != 0:
        pytest.skip("making control groups needs root")
    found = cgroup_folders("cpu")
    if not found or not (found[-1] / "cpu.cfs_quota_us").parent.is_dir():
        pytest.skip("the cpu controller of version 1 is not mounted")
    outer = found[-1] / f"hpctrain-test-{os.getpid()}"
    inner = outer / "task"
    try:
        inner.mkdir(parents=True)
        (outer / "cpu.cfs_quota_us").write_text("150000", encoding="ascii")
    except OSError as error:
        pytest.skip(f"no control group can be made here: {error}")
    try:
        said = subprocess.run(
            [sys.executable, "-c", SAYS, str(inner)],
            capture_output=True,
            text=True,
            timeout=JOB_SECONDS,
            check=True,
        ).stdout
        assert said.split()[:2] == ["[1.5]", "1"]
    finally:
        for folder in (inner, outer):
            with suppress(OSError):
                folder.rmdir()
