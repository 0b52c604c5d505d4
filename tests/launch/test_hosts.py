"""Two hosts, as network namespaces: ranks meet whatever their names resolve to."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpctrain.data.digits import pack_digits

ROOT = Path(__file__).parents[2]
TAG = f"h{os.getpid() % 100000}"
HOSTS = {"A": 1, "B": 2}

# What each host's /etc/hosts says of the two names: {k} is the host's number, {me} its own name.
NAMES = {
    "right": "10.77.0.1 A\n10.77.0.2 B\n",
    "debian": "127.0.1.1 {me}\n",
    "management": "10.88.0.1 A\n10.88.0.2 B\n",  # a network that the other host cannot reach
    "unresolvable": "",
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


def on_both(hosts: Path, names: str, *command: str, cwd: Path = ROOT) -> tuple[int, str]:
    """Run a command as two ranks on each host, started from A."""
    for name, number in HOSTS.items():
        table = "127.0.0.1 localhost\n" + NAMES[names].format(k=number, me=name)
        (hosts / f"hosts.{name}").write_text(table, encoding="utf-8")
    enter = str(hosts / "enter.sh")
    # hydra and MPI are told their interface: the names are for us to survive, not for them.
    launch = ["mpirun", "-launcher", "ssh", "-launcher-exec", enter, "-iface", "eth0"]
    inner = [*launch, "-hosts", "A:2,B:2", "-np", "4", *command]
    environment = os.environ | {"FI_TCP_IFACE": "eth0"}
    result = subprocess.run(
        [enter, "A", " ".join(inner)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        env=environment,
    )
    return result.returncode, result.stdout + result.stderr


@pytest.mark.parametrize("names", list(NAMES))
def test_ranks_meet_whatever_names_resolve_to(hosts: Path, names: str) -> None:
    body = str(ROOT / "tests" / "mpi" / "communicator.py")
    code, output = on_both(hosts, names, sys.executable, body)
    assert code == 0, output
    assert "passed 4 MPICH's mpirun gloo" in output


def test_the_main_job_on_two_hosts(hosts: Path, tmp_path: Path) -> None:
    pack_digits(tmp_path / "data" / "digits")
    config = str(ROOT / "configs" / "run.toml")
    job = (sys.executable, "-m", "hpctrain", config, "training.max_epochs=2")
    code, output = on_both(hosts, "debian", *job, cwd=tmp_path)
    assert code == 0, output
    assert "4 ranks on 2 nodes" in output
    assert "run digits complete" in output


def test_an_address_that_nobody_reaches_is_told_as_a_table(hosts: Path, tmp_path: Path) -> None:
    pack_digits(tmp_path / "data" / "digits")
    config = str(ROOT / "configs" / "run.toml")
    job = (sys.executable, "-m", "hpctrain", config, "launch.interface=admin0")
    code, output = on_both(hosts, "right", *job, cwd=tmp_path)
    assert code == 69, output
    assert "10.88.0.1 (admin0): not reached from B" in output
    assert output.count("hpctrain: error") == 1
    assert "Traceback" not in output
