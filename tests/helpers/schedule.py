"""Which file of tests a worker of pytest takes next, so that no core is idle.

Tests that start jobs wait a good part of their time: for starts, schedulers and limits. Some of the
workers compute meanwhile, which unit tests do; the others begin with the files that take longest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from xdist.scheduler import LoadFileScheduling
from xdist.workermanage import WorkerController

from helpers.rooms import calculates

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


class SideBySide(LoadFileScheduling):
    """Files one by one to the workers that know them, of jobs and of units at the same time."""

    def __init__(self, config: pytest.Config, log: Any) -> None:
        super().__init__(config, log)
        self._files: dict[WorkerController, set[str]] = {}

    def add_node_collection(self, node: WorkerController, collection: Sequence[str]) -> None:
        """Take note of what a worker knows: all of a room, or of all rooms."""
        self.registered_collections[node] = list(collection)
        self._files[node] = set(map(self._split_scope, collection))

    def schedule(self) -> None:
        """Give every worker a first file; called again, those that have come since."""
        if self.collection is None:
            rooms = dict.fromkeys(map(tuple, self.registered_collections.values()))
            whole = [test for room in rooms for test in room]
            if len(whole) != len(set(whole)):
                super().schedule()  # which tells what two workers of a room do not both have
                return
            self.collection = whole
            for test in whole:
                self.workqueue.setdefault(self._split_scope(test), {})[test] = False
            session = self.config.pluginmanager.get_plugin("session")
            if session is not None:
                session.testscollected = len(whole)  # not only those of the last worker
            for node in self.nodes:
                self._reschedule(node)
        for node in self.nodes:
            self._reschedule(node)

    def _assign_work_unit(self, node: WorkerController) -> None:
        file = next_file(self._files_for(node), calculates(node.gateway.id))
        self.workqueue.move_to_end(file, last=False)
        super()._assign_work_unit(node)

    def _reschedule(self, node: WorkerController) -> None:
        """Give a worker its next file late: it begins a test when it knows the next one."""
        if node not in self.registered_collections or node.shutting_down:
            return  # it takes the place of one that has crashed, and still collects
        if not self._files_for(node):
            node.shutdown()
        elif self._pending_of(self.assigned_work[node]) <= 1:
            self._assign_work_unit(node)

    def _files_for(self, node: WorkerController) -> list[str]:
        """Return the files that are left for a worker."""
        return [file for file in self.workqueue if file in self._files[node]]


def next_file(files: list[str], calculates: bool) -> str:
    """Return which of the files that are left a worker is to take."""

    def order(file: str) -> tuple[bool, int]:
        starts_jobs = file.startswith("tests/launch/")
        return (starts_jobs == calculates, FIRST.index(file) if file in FIRST else len(FIRST))

    return min(files, key=order)
