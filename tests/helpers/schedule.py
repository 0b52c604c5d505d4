"""Which file of tests a worker of pytest takes next, so that no core is idle.

Tests that start jobs wait a good part of their time: for starts, schedulers and limits. Some of the
workers compute meanwhile, which unit tests do; the others begin with the files that take longest.
"""

from __future__ import annotations

from xdist.scheduler import LoadFileScheduling
from xdist.workermanage import WorkerController

FIRST = (
    "tests/launch/test_hosts.py",
    "tests/launch/test_bodies.py",
    "tests/launch/test_batch_slurm.py",
    "tests/launch/test_batch.py",
    "tests/launch/test_sweeps.py",
    "tests/launch/test_main_job.py",
    "tests/launch/test_controls.py",
    "tests/launch/test_own_loop.py",
    "tests/launch/test_inference.py",
    "tests/launch/test_lightning.py",
    "tests/launch/test_check.py",
    "tests/launch/test_user_data.py",
    "tests/launch/test_transforms.py",
    "tests/launch/test_staging.py",
    "tests/launch/test_stops.py",
    "tests/launch/test_failures.py",
    "tests/launch/test_without_mpi.py",
    "tests/launch/test_weather.py",
    "tests/unit/test_house.py",
    "tests/unit/cli/test_prepare.py",
)
"""The files that take longest; a worker that is given one of them late is what all wait for."""

WORKERS_PER_CALCULATOR = 4
"""Of so many workers one begins with unit tests."""


class SideBySide(LoadFileScheduling):
    """Files one by one to the workers, those of jobs and those of units at the same time."""

    def _assign_work_unit(self, node: WorkerController) -> None:
        calculates = int(node.gateway.id.removeprefix("gw")) % WORKERS_PER_CALCULATOR == 0
        self.workqueue.move_to_end(next_file(list(self.workqueue), calculates), last=False)
        super()._assign_work_unit(node)

    def _reschedule(self, node: WorkerController) -> None:
        """Give a worker its next file late: it begins a test when it knows the next one."""
        if node not in self.registered_collections:
            return  # it takes the place of one that has crashed, and still collects
        if self.workqueue and self._pending_of(self.assigned_work[node]) > 1:
            return
        super()._reschedule(node)


def next_file(files: list[str], calculates: bool) -> str:
    """Return which of the files that are left a worker is to take."""

    def order(file: str) -> tuple[bool, int]:
        starts_jobs = file.startswith("tests/launch/")
        return (starts_jobs == calculates, FIRST.index(file) if file in FIRST else len(FIRST))

    return min(files, key=order)
