"""When a lease is stale: the rules as a table, and what is known of a process."""

from __future__ import annotations

import ctypes
import dataclasses
import os
import signal
import subprocess
import sys
from typing import Any

import pytest

from hpctrain.checkpoint.lease_rules import (
    Holder,
    Verdict,
    began_together,
    judge,
    lives_here,
    this_holder,
)
from hpctrain.utils import proc

HOLDS, STALE, WATCH = Verdict.HOLDS, Verdict.STALE, Verdict.WATCH
OWN = Holder(nonce="b", job="77", restart=2, token="t", attempt=3)


@pytest.mark.parametrize(
    ("changes", "age", "lives", "gone", "verdict"),
    [
        # Nothing is known but the heartbeat.
        ({}, 0.0, None, None, HOLDS),
        ({}, 89.0, None, None, HOLDS),
        ({}, 91.0, None, None, STALE),
        ({}, -4.0, None, None, HOLDS),
        ({}, -6.0, None, None, WATCH),
        ({}, -1e9, None, None, WATCH),
        # The process can be seen.
        ({}, 0.0, True, None, HOLDS),
        ({}, 0.0, False, None, STALE),
        ({}, -3600.0, True, True, HOLDS),
        ({}, -3600.0, False, None, STALE),
        # The scheduler knows the job.
        ({"job": "76"}, 0.0, None, True, STALE),
        ({"job": "76"}, 0.0, None, False, HOLDS),
        ({"job": "76"}, -60.0, None, False, WATCH),
        ({"job": "76"}, 0.0, True, True, HOLDS),
        # The same job, started again by its scheduler.
        ({"job": "77", "restart": 1}, 0.0, None, None, STALE),
        ({"job": "77", "restart": 1}, 0.0, True, None, HOLDS),
        ({"job": "77", "restart": 2}, 0.0, None, True, HOLDS),
        ({"job": "77", "restart": 3}, 0.0, None, None, HOLDS),
        # An earlier attempt of the same chain.
        ({"token": "t", "attempt": 2}, 0.0, None, None, STALE),
        ({"token": "t", "attempt": 2}, 0.0, True, None, HOLDS),
        ({"job": "76", "token": "t", "attempt": 2}, 0.0, None, True, STALE),
        ({"job": "76", "token": "t", "attempt": 2}, 0.0, None, False, WATCH),
        ({"token": "t", "attempt": 3}, 0.0, None, None, HOLDS),
        ({"token": "t", "attempt": 4}, 0.0, None, None, HOLDS),
        ({"token": "u", "attempt": 1}, 0.0, None, None, HOLDS),
    ],
)
def test_the_rules(
    changes: dict[str, Any], age: float, lives: bool | None, gone: bool | None, verdict: Verdict
) -> None:
    holder = Holder(nonce="a", **changes)
    assert judge(holder, OWN, age=age, lives=lives, job_is_gone=lambda: gone) is verdict


def test_a_scheduler_is_only_asked_where_nothing_else_tells() -> None:
    def asked() -> bool:
        raise AssertionError

    for changes, age, lives in (({}, 91.0, None), ({}, 0.0, True), ({"job": "77"}, 0.0, None)):
        judge(Holder(nonce="a", **changes), OWN, age=age, lives=lives, job_is_gone=asked)


def test_a_process_lives_or_not() -> None:
    here = this_holder({})
    assert lives_here(here) is True
    assert lives_here(dataclasses.replace(here, started="1")) is False
    for change in ("host", "boot", "namespace"):
        assert lives_here(dataclasses.replace(here, **{change: "another"})) is None
    # As version 0.1.0 wrote it: of which namespace its process is nobody knows.
    assert lives_here(dataclasses.replace(here, namespace="", pid=2**22 - 1)) is None
    # Start times of another clock cannot be compared.
    assert lives_here(dataclasses.replace(here, clock="another", started="1")) is None
    for pid in (2**22 - 1, 2**31 - 1, 2**70):
        assert proc.lives(pid, "1") is False
    assert proc.lives(0, None) is None


def test_a_process_that_nobody_has_waited_for_is_dead() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        started = proc.start_time(child.pid)
        assert proc.lives(child.pid, started) is True
        os.kill(child.pid, signal.SIGKILL)
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert proc.start_time(child.pid) == started
        assert proc.lives(child.pid, started) is False


def test_a_process_that_proc_hides_is_not_taken_for_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    """As under hidepid, where it is of another user."""
    monkeypatch.setattr(proc, "stat_fields", lambda *_: [])
    assert proc.lives(os.getpid(), proc.start_time(1)) is None


@pytest.mark.skipif(os.geteuid() != 0, reason="making a PID namespace needs root")
def test_in_a_namespace_without_its_own_proc_other_processes_are_not_looked_at() -> None:
    """There /proc/1 is the first process of the machine, and not this one."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        ctypes.CDLL(None).unshare(0x20000000)  # CLONE_NEWPID, of the next child
        if os.fork() == 0:
            here = this_holder({})
            found = (here.pid, here.started, proc.lives(1, "1"), proc.lives(4321, "1"))
            os.write(writing, repr(found).encode())
            os._exit(0)
        os.wait()
        os._exit(0)
    os.waitpid(child, 0)
    os.close(writing)
    with os.fdopen(reading) as result:
        assert result.read() == "(1, None, None, False)"


@pytest.mark.parametrize(
    ("holder", "own", "expected"),
    [
        # in one job: a loop over aprun, ssh or srun -n1 in its script, however slow
        ({"job": "7", "since": "2026-01-01 10:00:00"}, {"job": "7"}, True),
        ({"job": "7", "restart": 1}, {"job": "7"}, False),
        ({"job": "7"}, {"job": "8"}, False),
        ({"job": "7"}, {}, False),
        # outside of any: by a loop over ssh
        ({"since": "2026-01-01 10:00:30"}, {}, True),
        ({"since": "2026-01-01 09:58:59"}, {}, False),
        ({"since": "yesterday"}, {}, False),
    ],
)
def test_two_that_a_loop_has_started(
    holder: dict[str, Any], own: dict[str, Any], expected: bool
) -> None:
    mine = Holder(nonce="b", since="2026-01-01 10:00:00", **own)
    assert began_together(Holder(nonce="a", **holder), mine) == expected
