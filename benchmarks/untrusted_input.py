"""Strangers at every socket of a job, from another host and as another user: what becomes of it.

    python benchmarks/untrusted_input.py             until each kind of socket got all strings
    python benchmarks/untrusted_input.py --others    those of torch and MPI, while a job trains

Needs root: two hosts and a stranger are network namespaces on a bridge. Jobs of two ranks on each
host are started again and again. As soon as a socket of theirs listens, the stranger sends it 200
random byte strings and 50 structured ones (tests/helpers/garbage.py) and leaves half-open
connections behind, more than the lowered limit of descriptors; another user of host A does the same
at the watchdogs' local socket. Every job has to end as one that nobody disturbs.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from helpers.garbage import STRUCTURED, random_strings  # noqa: E402

TAG = f"u{os.getpid() % 100000}"
HOSTS = {"A": "10.79.0.1", "B": "10.79.0.2"}
STRANGER = {"C": "10.79.0.3"}
STRINGS = [*random_strings(200), *STRUCTURED]
IDLE = 100
THREADS = 4
OPEN_FILES, MANY_FILES = 256, 4096
GREETING = b"hpctrain-1 "
NOBODY = 65534
RESULT = "0 ['result 4 1.0']"
"""Of every job: exit code, and what rank 0 says."""
JOB_SECONDS = 300
# In mount and host name spaces of its own, with few descriptors.
ENTER = """#!/usr/bin/env bash
while [[ $1 == -* ]]; do shift; done
host=$1; shift
exec ip netns exec {tag}$host unshare --uts --mount bash -c '
  hostname "$0"; mount --bind {folder}/hosts /etc/hosts; ulimit -n {files}; exec bash -c "$*"
' "$host" "$@"
"""


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--others", action="store_true", help="attack torch and MPI in training")
    parser.add_argument("--jobs", type=int, help="so many jobs, and no undisturbed one")
    parser.add_argument("--stranger", nargs=2, metavar=("KIND", "ALL"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.stranger:
        return be_stranger(asked.stranger[0], attacks_all=asked.stranger[1] == "all")
    # Hosts are taken down also where the benchmark is ended.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    if os.geteuid() != 0:
        print("network namespaces need root")
        return 1
    with hosts(MANY_FILES if asked.others else OPEN_FILES) as enter:
        expected = RESULT
        if asked.jobs is None:
            expected, _ = run_job(enter, Counter(), attack=None)
            print("undisturbed:", expected, flush=True)
        counts: Counter[str] = Counter()
        if asked.others:
            outcome, log = run_job(enter, counts, attack="all")
            same = "as the undisturbed one" if outcome == expected else f"otherwise: {outcome}"
            print(f"{log[-5000:]}\nattacked at sockets of torch and MPI, it ended {same}")
            print(show(counts))
            return 0
        begin = time.monotonic()
        for number in itertools.count(1):
            outcome, log = run_job(enter, counts, attack="ours")
            if outcome != expected:
                print(f"job {number} under attack ended otherwise: {outcome}\n{log}")
                return 1
            # Probes share its doorkeeper; its socket closes once all nodes are there.
            done = [counts["probe"] + counts["coordinator"], counts["local"]]
            print(f"{number} jobs, {time.monotonic() - begin:.0f} s: {show(counts)}", flush=True)
            if number == asked.jobs or (min(done) >= len(STRINGS) and counts["coordinator"]):
                break
        print(f"all {number} jobs ended as the undisturbed one")
    return 0


def show(counts: Counter[str]) -> str:
    return ", ".join(f"{kind} {count:,}" for kind, count in sorted(counts.items()))


@contextmanager
def hosts(open_files: int) -> Iterator[Path]:
    """Give the command that enters a host, where a process may open so many files."""
    folder = Path(tempfile.mkdtemp(prefix="untrusted-"))
    table = "127.0.0.1 localhost\n" + "".join(f"{ip} {name}\n" for name, ip in HOSTS.items())
    (folder / "hosts").write_text(table, encoding="utf-8")
    try:
        command("ip", "link", "add", f"{TAG}br", "type", "bridge")
        command("ip", "link", "set", f"{TAG}br", "up")
        for name, ip in (HOSTS | STRANGER).items():
            space, veth = f"{TAG}{name}", f"{TAG}v{name}"
            command("ip", "netns", "add", space)
            inner = ("peer", "name", "eth0", "netns", space)
            command("ip", "link", "add", veth, "type", "veth", *inner)
            command("ip", "link", "set", veth, "master", f"{TAG}br", "up")
            command("ip", "-n", space, "address", "add", f"{ip}/24", "dev", "eth0")
            for device in ("eth0", "lo"):
                command("ip", "-n", space, "link", "set", device, "up")
        enter = folder / "enter.sh"
        text = ENTER.format(tag=TAG, folder=folder, files=open_files)
        enter.write_text(text, encoding="utf-8")
        enter.chmod(0o755)
        yield enter
    finally:
        for name in HOSTS | STRANGER:
            subprocess.run(["ip", "netns", "delete", f"{TAG}{name}"], check=False)
        subprocess.run(["ip", "link", "delete", f"{TAG}br"], check=False)
        shutil.rmtree(folder, ignore_errors=True)


def command(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True)


BODY = """
import sys, time
import torch
from torch import distributed as dist
import hpctrain

with hpctrain.connect() as world:
    value = torch.arange(1000.0) * (world.topology.rank + 1)
    end = time.monotonic() + float(sys.argv[1])
    for step in range(1, 400):
        dist.all_reduce(value)
        value = value / value.max()
        world.communicator.barrier()
        world.pulse.step_done(step)
        if time.monotonic() < end:
            time.sleep(0.02)
    everyone = world.communicator.all_gather(value.numpy().tobytes())
    if world.topology.is_rank_zero:
        assert len(set(everyone)) == 1
        print("result", len(everyone), value.max().item(), flush=True)
"""


def run_job(enter: Path, counts: Counter[str], attack: str | None) -> tuple[str, str]:
    """Run a job of two ranks on each host, and return its result and its log."""
    body = enter.with_name("body.py")
    body.write_text(BODY, encoding="utf-8")
    launch = ["mpirun", "-launcher", "ssh", "-launcher-exec", str(enter), "-iface", "eth0"]
    inner = [*launch, "-hosts", "A:2,B:2", "-np", "4", sys.executable, str(body)]
    inner.append("8" if attack == "all" else "0")
    strangers = [] if attack is None else start_strangers(attack)
    job = subprocess.Popen(
        [enter, "A", " ".join(inner)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"FI_TCP_IFACE": "eth0", "PYTHONPATH": str(ROOT)},
    )
    over = threading.Event()
    watching = threading.Thread(target=point_out, args=(strangers, over))
    watching.start()
    try:
        log, _ = job.communicate(timeout=JOB_SECONDS)
    except subprocess.TimeoutExpired:
        job.kill()
        log = f"{job.communicate()[0]}\nit did not end within {JOB_SECONDS} s"
    over.set()
    watching.join()
    for stranger in strangers:
        said, _ = stranger.communicate(timeout=JOB_SECONDS)
        counts.update(json.loads(said.splitlines()[-1]) if said else {})
    results = [line for line in log.splitlines() if line.startswith("result")]
    return f"{job.returncode} {results}", log


def start_strangers(attack: str) -> list[subprocess.Popen[str]]:
    """Start the one on another host, and the one who is another user on host A."""
    return [
        subprocess.Popen(
            [
                *("ip", "netns", "exec", f"{TAG}{name}"),
                *(sys.executable, __file__, "--stranger", kind, attack),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name, kind in (("C", "remote"), ("A", "local"))
    ]


def point_out(strangers: Sequence[subprocess.Popen[str]], over: threading.Event) -> None:
    """Tell strangers of every socket that listens, as a scanner would find it."""
    known: set[str] = set()
    while strangers and not over.is_set():
        for host in HOSTS:
            for line in listening(host) - known:
                known.add(line)
                for stranger in strangers:
                    assert stranger.stdin is not None
                    with suppress(OSError):
                        stranger.stdin.write(line + "\n")
                        stranger.stdin.flush()
        time.sleep(0.002)


def listening(host: str) -> set[str]:
    """Return the ports that are open on a host, and A's local sockets, a line each."""
    pids = subprocess.run(
        ["ip", "netns", "pids", f"{TAG}{host}"], capture_output=True, text=True, check=False
    ).stdout.split()
    if not pids:
        return set()
    found = set()
    with suppress(OSError):
        for name in ("tcp", "tcp6"):
            for line in Path(f"/proc/{pids[0]}/net/{name}").read_text().splitlines()[1:]:
                words = line.split()
                if words[3] == "0A" and not words[1].startswith("0100007F"):
                    found.add(f"{HOSTS[host]} {int(words[1].rpartition(':')[2], 16)}")
        for line in Path(f"/proc/{pids[0]}/net/unix").read_text().splitlines():
            if host == "A" and "@hpctrain-" in line:
                found.add(line.split()[-1])
    return found


def be_stranger(kind: str, *, attacks_all: bool) -> int:
    """Attack what stdin names, until it ends; say at the end what was sent to whom."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (8192, 8192))
    if kind == "local":
        os.setgroups([])
        os.setuid(NOBODY)
    ctypes.CDLL(None).prctl(1, 9)  # ends with its parent
    stranger = Stranger(attacks_all=attacks_all)
    for line in sys.stdin:
        words = line.split()
        if (len(words) == 1) == (kind == "local"):
            for _ in range(THREADS):
                threading.Thread(target=stranger.attack, args=(words,), daemon=True).start()
    print(json.dumps(stranger.counts), flush=True)
    os._exit(0)


class Stranger:
    """Sends everything to a socket, over and over as long as it listens."""

    def __init__(self, *, attacks_all: bool) -> None:
        self.counts: Counter[str] = Counter()
        self._ours: dict[str, list[str]] = {}
        self._attacks_all = attacks_all
        self._lock = threading.Lock()
        self._next = itertools.count()

    def attack(self, words: Sequence[str]) -> None:
        idle: list[socket.socket] = []
        with suppress(OSError):
            kind = self._kind(words)
            if kind == "other" and not self._attacks_all:
                return
            begin = time.monotonic()
            while kind != "other" or time.monotonic() < begin + 6:
                with connect(words) as connection:
                    if kind in ("probe", "coordinator") and not greets(connection):
                        return  # it has become that of torch's store
                    connection.settimeout(0.5)
                    with suppress(OSError):
                        connection.sendall(STRINGS[next(self._next) % len(STRINGS)])
                    self._count(kind)
                if len(idle) < IDLE and kind != "other":
                    idle.append(connect(words))
                    if kind in ("probe", "coordinator") and not greets(idle[-1]):
                        idle.pop().close()
                        return
                    self._count(f"{kind}, half-open")

    def _kind(self, words: Sequence[str]) -> str:
        """Tell our sockets from those of others: ours say who they are."""
        if len(words) == 1:
            return "local"
        with connect(words) as connection:
            if not greets(connection):
                return "other"
        # Host A has two after each other.
        with self._lock:
            ports = self._ours.setdefault(words[0], [])
            if words[1] not in ports:
                ports.append(words[1])
            return "probe" if ports.index(words[1]) == 0 else "coordinator"

    def _count(self, kind: str) -> None:
        with self._lock:
            self.counts[kind] += 1


def greets(connection: socket.socket) -> bool:
    """Tell whether a socket of ours has taken a connection."""
    connection.settimeout(0.5)
    try:
        return connection.recv(100).startswith(GREETING)
    except TimeoutError:
        return False


def connect(words: Sequence[str]) -> socket.socket:
    if len(words) == 2:
        return socket.create_connection((words[0], int(words[1])), 2)
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(2)
    connection.connect(words[0].replace("@", "\0", 1))
    return connection


if __name__ == "__main__":
    sys.exit(main())
