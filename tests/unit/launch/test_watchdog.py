"""What watchdogs make of what they see: the verdict, its words, and the facts behind them."""

from __future__ import annotations

import json
import mmap
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from hpctrain.batch.exit_status import Outcome, read_outcome, write_outcome
from hpctrain.launch.watchdog import processes
from hpctrain.launch.watchdog.client import ROW_BYTES, Pulse, Reading, read_row
from hpctrain.launch.watchdog.evidence import write_report
from hpctrain.launch.watchdog.judge import Judge
from hpctrain.launch.watchdog.process import Orders, parse_orders
from hpctrain.launch.watchdog.protocol import Channel
from hpctrain.launch.watchdog.verdicts import (
    AskStacks,
    AskToStop,
    Death,
    End,
    Group,
    LauncherGone,
    NodeLost,
    Reply,
    Stall,
    Stand,
    Tell,
    laggards,
    main_stack,
    story,
)

GROUPS = {0: Group(host="a", ranks=(0, 1)), 2: Group(host="b", ranks=(2, 3))}
GONE = LauncherGone(host="b", ranks=(2, 3), name="hydra_pmi_proxy", pid=41, signal="SIGKILL")
SCRIPT = LauncherGone(
    host="a", ranks=(0, 1), name="mpirun", pid=4, signal="SIGKILL", is_front_end=True
)
KILLED = Death(rank=3, host="b", signal="SIGKILL", signal_number=9, step=7)


@pytest.fixture
def judge() -> Judge:
    return Judge(GROUPS, hang_timeout_seconds=60, first_step_timeout_seconds=600)


def stand(rank: int, progress: int = 5, state: str = "S", stack: str = "all_reduce") -> Stand:
    host = "a" if rank < 2 else "b"
    return Stand(rank=rank, host=host, progress=progress, step=2, state=state, stack=stack)


class TestJudge:
    def test_a_rank_that_fails_by_itself_tells_at_once_and_the_others_are_silent(
        self, judge: Judge
    ) -> None:
        assert judge.failing(2, 70, False, 0.0) == [Reply(2, may_speak=True)]
        assert judge.failing(1, 70, True, 0.0) == [Reply(1, may_speak=False)]
        assert judge.failing(0, 65, False, 0.0) == [Reply(0, may_speak=False)]
        assert judge.died(KILLED) == []  # the launcher clears up
        assert judge.died(Death(rank=2, host="b", exit_code=70)) == [End(70)]

    def test_a_rank_that_never_ends_after_its_story_is_ended(self, judge: Judge) -> None:
        judge.failing(2, 65, False, 0.0)
        assert judge.look(4.0) == []
        assert judge.look(5.0) == [End(65)]

    def test_an_echo_waits_for_the_death_that_caused_it(self, judge: Judge) -> None:
        assert judge.failing(0, 70, True, 0.0) == []
        assert judge.look(0.4) == []
        assert judge.died(KILLED) == [Reply(0, may_speak=False), Tell(KILLED), End(137)]
        assert judge.look(9.0) == []

    def test_an_echo_without_a_cause_is_the_story(self, judge: Judge) -> None:
        """The network fails, and all ranks live."""
        judge.failing(0, 70, True, 0.0)
        judge.failing(1, 70, True, 0.1)
        assert judge.look(0.5) == [Reply(0, may_speak=True), Reply(1, may_speak=False)]

    def test_only_the_first_death_counts(self, judge: Judge) -> None:
        assert judge.died(KILLED) == [Tell(KILLED), End(137)]
        assert judge.died(Death(rank=0, host="a", signal="SIGKILL", signal_number=9)) == []

    def test_a_lost_node_counts_unless_it_was_cleared_up(self, judge: Judge) -> None:
        judge.lost(2, 0.0)
        assert judge.look(0.4) == []
        lost = NodeLost(GROUPS[2])
        assert judge.look(0.5) == [Tell(lost), End(69)]

    def test_a_death_explains_a_lost_node(self, judge: Judge) -> None:
        judge.lost(2, 0.0)
        assert judge.died(KILLED)[0] == Tell(KILLED)
        assert judge.look(9.0) == []

    def test_a_launcher_that_is_gone_explains_what_follows(self, judge: Judge) -> None:
        """It takes ranks with it, or their output: then they fail by that."""
        judge.launcher_gone(GONE, 0.0)
        assert judge.look(1.9) == []
        assert judge.died(KILLED) == [Tell(GONE), End(69)]
        other = Judge(GROUPS, hang_timeout_seconds=60, first_step_timeout_seconds=600)
        other.launcher_gone(GONE, 0.0)
        broken_pipe = other.failing(1, 70, False, 0.1)
        assert broken_pipe == [Reply(1, may_speak=False), Tell(GONE), End(69)]

    def test_ranks_do_not_go_on_without_their_launcher(self, judge: Judge) -> None:
        judge.launcher_gone(GONE, 0.0)
        assert judge.look(2.0) == [Tell(GONE), End(69)]

    @pytest.mark.parametrize("order", [(0, 1), (1, 0)])
    def test_of_two_that_are_gone_the_front_end_is_the_cause(
        self, judge: Judge, order: tuple[int, int]
    ) -> None:
        for index in order:
            judge.launcher_gone((GONE, SCRIPT)[index], 0.0)
        assert judge.look(2.0) == [Tell(replace(SCRIPT, is_front_end=False)), End(69)]

    def test_a_front_end_that_gives_up_for_a_daemon_is_not_the_cause(self, judge: Judge) -> None:
        judge.launcher_gone(GONE, 0.0)
        judge.launcher_gone(replace(SCRIPT, signal=None), 0.1)
        assert judge.look(2.0) == [Tell(GONE), End(69)]

    def test_ranks_whose_front_end_is_gone_are_asked_to_stop(self, judge: Judge) -> None:
        """They can still save: what has started them is there."""
        judge.moved(0, False, 0.0)
        judge.launcher_gone(SCRIPT, 0.0)
        assert judge.look(2.0) == [AskToStop(SCRIPT)]
        assert judge.look(9.0) == []
        assert judge.failing(1, 74, False, 9.0) == [Reply(1, may_speak=True)]

    def test_a_loop_that_knows_no_stop_ends_by_the_request(self, judge: Judge) -> None:
        judge.launcher_gone(SCRIPT, 0.0)
        judge.look(2.0)
        asked = Death(rank=1, host="a", signal="SIGTERM", signal_number=15)
        assert judge.died(asked) == [End(69)]

    def test_a_daemon_that_goes_after_its_front_end_ends_the_job(self, judge: Judge) -> None:
        judge.launcher_gone(SCRIPT, 0.0)
        judge.look(2.0)
        judge.launcher_gone(GONE, 3.0)
        assert judge.look(3.0) == [Tell(replace(SCRIPT, is_front_end=False)), End(69)]

    def test_a_launcher_that_clears_up_is_not_the_cause(self, judge: Judge) -> None:
        assert judge.died(KILLED) == [Tell(KILLED), End(137)]
        judge.launcher_gone(GONE, 0.1)
        assert judge.look(9.0) == []

    def test_a_loop_that_never_ticks_has_no_limit(self, judge: Judge) -> None:
        assert judge.look(1e6) == []

    @pytest.mark.parametrize(("long_phase", "limit"), [(False, 60), (True, 600)])
    def test_standing_still_ends_the_job_at_its_limit(
        self, judge: Judge, long_phase: bool, limit: float
    ) -> None:
        judge.moved(0, False, 0.0)
        judge.moved(2, long_phase, 10.0)
        assert judge.look(limit + 9.9) == []
        assert judge.look(limit + 10) == [AskStacks()]
        assert judge.stands([stand(0), stand(1)]) == []
        actions = judge.stands([stand(2), stand(3, progress=4)])
        verdict = Stall(limit, (stand(0), stand(1), stand(2), stand(3, progress=4)))
        assert actions == [Tell(verdict), End(70)]

    def test_a_rank_that_leaves_is_followed_by_the_others_or_named(self, judge: Judge) -> None:
        """Also where no rank has ever given a heartbeat."""
        judge.leaving(1, 5.0)
        judge.leaving(2, 20.0)
        assert judge.look(64.9) == []
        assert judge.look(65.0) == [AskStacks()]
        judge.stands([stand(0), stand(1)])
        actions = judge.stands([stand(2), stand(3)])
        verdict = Stall(60, tuple(stand(rank) for rank in range(4)), left=(1, 2))
        assert actions == [Tell(verdict), End(70)]
        assert "ranks 1 to 2 exited connect() while ranks 0, 3 are still running" in story(verdict)

    def test_a_rank_that_leaves_early_waits_for_those_that_get_on(self, judge: Judge) -> None:
        judge.leaving(1, 5.0)
        judge.moved(0, False, 50.0)
        assert judge.look(109.9) == []
        for rank in (0, 2, 3):
            judge.leaving(rank, 105.0)
        judge.moved(0, True, 106.0)
        assert judge.look(200.0) == []  # all are on their way out, for which the longer limit holds

    def test_a_program_around_several_jobs_takes_its_time(self, judge: Judge) -> None:
        """A heartbeat of one job's body, and one that left it, say nothing of what follows."""
        for rank in range(4):
            judge.entering(
                rank,
                30,
                40,
            )
        judge.moved(0, False, 0.0)
        for rank in range(4):
            judge.leaving(rank, 1.0)
        for rank in range(4):
            judge.outside(rank)
        assert judge.look(1000.0) == []
        judge.leaving(3, 1000.0)  # its program is over, and the others do what they have to
        assert judge.look(2000.0) == []
        judge.entering(0, 30, 40)  # and one waits in the next body for one that is over
        assert judge.look(2001.0) == [AskStacks()]

    def test_limits_are_those_of_the_body(self, judge: Judge) -> None:
        for rank in range(4):
            judge.outside(rank)
        for rank in range(4):
            judge.entering(rank, 30 if rank == 0 else 10, 40)
        assert judge.look(100.0) == []  # no heartbeat yet
        judge.moved(0, False, 100.0)
        assert judge.look(129.9) == []
        assert judge.look(130.0) == [AskStacks()]

    def test_nodes_that_do_not_answer_are_not_waited_for(self, judge: Judge) -> None:
        judge.moved(0, False, 0.0)
        judge.look(60)
        judge.stands([stand(0), stand(1)])
        assert judge.look(62) == [Tell(Stall(60, (stand(0), stand(1)))), End(70)]

    def test_whoever_gets_on_after_all_is_left_alone(self, judge: Judge) -> None:
        judge.moved(0, False, 0.0)
        assert judge.look(60) == [AskStacks()]
        judge.moved(2, False, 60.1)
        assert judge.look(63) == []
        assert judge.stands([stand(rank) for rank in range(4)]) == []

    def test_it_is_looked_again_in_time(self, judge: Judge) -> None:
        assert judge.due_seconds(0.0) == 1.0
        judge.moved(0, False, 0.0)
        assert judge.due_seconds(59.6) == pytest.approx(0.4)
        judge.failing(0, 70, True, 0.0)
        assert judge.due_seconds(0.0) == 0.1


@pytest.mark.parametrize(
    ("stands", "expected"),
    [
        ([stand(0), stand(1)], []),
        ([stand(0), stand(1, progress=4), stand(2)], [1]),
        ([stand(0), stand(1, progress=4), stand(2, state="T")], [2]),
        ([stand(0), stand(1, stack="read"), stand(2)], [1]),
        ([stand(0), stand(1, stack="read"), stand(2, stack="write")], []),
        ([stand(0, state="T"), stand(1, state="T")], []),
        ([], []),
    ],
)
def test_laggards(stands: Sequence[Stand], expected: Sequence[int]) -> None:
    assert [one.rank for one in laggards(stands)] == expected


@pytest.mark.parametrize(
    ("verdict", "code", "words"),
    [
        (KILLED, 137, ["rank 3@b was killed by SIGKILL"]),
        (
            Death(rank=1, host="a", signal="SIGKILL", signal_number=9, oom_kills=1),
            137,
            ["rank 1@a was killed by SIGKILL", "lack of memory", "data.micro_batch_size"],
        ),
        (Death(rank=1, host="a", exit_code=3), 3, ["exit code 3 and without an error message"]),
        (Death(rank=1, host="a", exit_code=0), 70, ["exit code 0 and without an error message"]),
        (Death(rank=1, host="a"), 137, ["rank 1@a was killed; the job ends"]),
        (NodeLost(GROUPS[2]), 69, ["node b with ranks 2 to 3 is gone"]),
        (GONE, 69, ["hydra_pmi_proxy (process 41 on b)", "ranks 2 to 3", "killed by SIGKILL"]),
        (
            replace(GONE, signal=None, ranks=(3,)),
            69,
            ["had started rank 3, has ended while it was"],
        ),
        (
            SCRIPT,
            69,
            ["mpirun (process 4 on a)", "killed by SIGKILL", "are asked to stop (SIGTERM)"],
        ),
        (NodeLost(Group(host="b", ranks=(5,))), 69, ["with rank 5 is gone"]),
        (NodeLost(Group(host="b", ranks=(1, 3))), 69, ["with ranks 1, 3 is gone"]),
        (
            Stall(300, (stand(0), stand(1, state="T"))),
            70,
            ["no progress for 300 s (hang timeout)", "rank 1@a is stopped", "after step 2"],
        ),
        (Stall(9, (stand(0), stand(1, progress=4))), 70, ["rank 1@a is behind the others"]),
        (Stall(9, (stand(0), stand(1), stand(2, state="D", stack="x"))), 70, ["waits for a disk"]),
        (Stall(9, (stand(0), stand(1))), 70, ["in different orders?", "Stack of rank 0@a"]),
        (Stall(9, tuple(stand(rank, state="T") for rank in range(9))), 70, ["no progress for 9 s"]),
    ],
)
def test_words(verdict: Death | NodeLost | Stall, code: int, words: list[str]) -> None:
    text = story(verdict, "runs/x/stacks")
    assert verdict.code == code
    assert text.startswith("hpctrain: ")
    assert text.endswith("\n")
    for word in words:
        assert word in text


def test_the_stack_of_the_main_thread() -> None:
    dump = (
        'Thread 0x1 (most recent call first):\n  File "t.py", line 1 in run\n\n'
        'Current thread 0x2 (most recent call first):\n  File "m.py", line 2 in main\n'
    )
    assert main_stack(dump) == '  File "m.py", line 2 in main'
    assert main_stack("") == ""


def test_signs_of_life_are_seen_through_shared_memory() -> None:
    memory = mmap.mmap(-1, 2 * ROW_BYTES)
    pulse = Pulse()
    pulse.tick()
    pulse.share(memory, 1)
    assert read_row(memory, 1) == Reading(progress=1, long_phase=True, step=0)
    pulse.step_done(12)
    assert read_row(memory, 1) == Reading(progress=2, long_phase=False, step=12)
    with pulse.long_phase():
        assert read_row(memory, 1).long_phase
    assert read_row(memory, 1) == Reading(progress=3, long_phase=False, step=12)
    assert read_row(memory, 0) == Reading(progress=0, long_phase=False, step=0)


@pytest.mark.parametrize(
    ("script", "status"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", 9),
        ("import os; os._exit(3)", 3 << 8),
    ],
)
def test_how_a_process_ended_is_seen_before_its_parent_asks(script: str, status: int) -> None:
    with subprocess.Popen([sys.executable, "-c", script]) as process:
        pidfd = processes.open_pidfd(process.pid)
        assert pidfd is not None
        # Readable once it has ended; it is not waited for, so that it is still there.
        assert select.select([pidfd], [], [], 30)[0]
        assert processes.is_ending(process.pid)
        assert processes.wait_status(process.pid) == status
        process.wait()
        assert processes.wait_status(process.pid) is None
        assert processes.wait_status(process.pid, pidfd) in (status, None)  # by the kernel's age
        os.close(pidfd)


def test_the_state_of_a_process() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", "input()"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL
    ) as process:
        assert not processes.is_ending(process.pid)
        os.kill(process.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED)
        assert processes.state(process.pid) == "T"
        process.kill()
    assert processes.state(process.pid) == ""
    assert processes.wait_status(process.pid) is None


def test_messages_come_whole_and_in_order() -> None:
    left, right = socket.socketpair()
    with left, right:
        for end in (left, right):
            end.setblocking(False)
        sender, receiver = Channel(left), Channel(right, longest_bytes=1 << 22)
        assert receiver.receive() == []
        large = {"stands": ["x" * 1000] * 2000}  # more than a socket takes at once
        sender.send({"moved": True})
        sender.send(large)
        received: list[object] = []
        while len(received) < 2:
            sender.flush()
            messages = receiver.receive()
            assert messages is not None
            received += messages
        assert received == [{"moved": True}, large]
        left.shutdown(socket.SHUT_WR)
        assert receiver.receive() is None


def test_orders_survive_their_way_into_the_process() -> None:
    orders = Orders(
        leader=2,
        groups=GROUPS,
        secret="s",
        ranks_fd=3,
        coordinator_fd=None,
        coordinator_address=("::1", 9),
        reports_its_loss=True,
        daemons=((41, "7", "prted", True), (40, "6", "mpirun", False)),
        hang_timeout_seconds=60.0,
        first_step_timeout_seconds=600.0,
    )
    assert parse_orders(json.loads(json.dumps(asdict(orders)))) == orders


def test_a_crash_report_and_the_end_of_the_job(tmp_path: Path) -> None:
    write_outcome(tmp_path, Outcome(code=None, reason="running", step=5, tries=2))
    write_report(
        tmp_path, rank=3, host="b", code=137, story="killed", step=7, about={"device": "cuda:1"}
    )
    report = json.loads((tmp_path / "crash-rank-3.json").read_text(encoding="utf-8"))
    assert report.items() >= {"rank": 3, "host": "b", "step": 7, "device": "cuda:1"}.items()
    outcome = read_outcome(tmp_path)
    assert outcome is not None
    assert (outcome.code, outcome.step, outcome.tries) == (137, 5, 2)
    assert "rank 3 on b failed" in outcome.reason


def test_a_folder_that_is_gone_stops_nobody(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_report(tmp_path / "no", rank=0, host="a", code=70, story="", step=None, about={})
    assert "no crash report" in capsys.readouterr().err
