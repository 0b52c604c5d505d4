"""A Slurm of two nodes on this machine: real daemons, away from any other Slurm that is here.

Each node is a slurmd with host name, boot id, process table and TmpFS of its own; the nodes share
this machine's network. All state is in one temporary folder, and all processes end with the lab.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import psutil

from helpers.limits import JOB_SECONDS
from helpers.ports import free_ports
from helpers.waiting import wait_for

NODES = ("n1", "n2")
CPUS = 4  # what each node claims to have, whatever this machine has
GPUS = 2

COMMANDS = ("munged", "slurmctld", "slurmd", "srun", "sbatch", "setpriv", "unshare")
PACKAGES = "slurm-wlm munge libpmix-dev"

# Neither systemd nor cgroups are needed. A requeued job waits until its credential has expired,
# two minutes by default, and one at its limit 30 s between SIGTERM and SIGKILL.
CONFIG = """\
ClusterName=hpctrain
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmdSpoolDir={folder}/%n
SlurmdParameters=config_overrides
TmpFS={folder}/tmp
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
MpiDefault=none
MessageTimeout=30
KillWait=10
ReturnToService=2
SchedulerParameters=batch_sched_delay=0,sched_interval=1
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
{nodes}
PartitionName=debug Nodes=ALL Default=YES MaxTime=600
"""

ISOLATED = ("--mount", "--uts", "--ipc", "--pid", "--mount-proc", "--kill-child")

# The host table knows the nodes. MPI libraries take processes of one boot id for neighbours with
# shared memory. Slurm's PMIx plugin names its folder in TmpFS after the job alone, and MPICH its
# shared memory: the second node of a job would find them taken.
NODE = """
set -e
hostname "$0"
cd "$1"
shift
mount --bind hosts /etc/hosts
mount --bind "tmp.$0" tmp
mount -t tmpfs tmpfs /dev/shm
cat /proc/sys/kernel/random/uuid >"boot_id.$0"
mount --bind "boot_id.$0" /proc/sys/kernel/random/boot_id
exec "$@"
"""

FOREIGN = ("SLURM", "SBATCH", "SRUN", "PMI", "OMPI_", "PRTE_", "MPI_", "I_MPI_", "HYDRA")


def why_not() -> str | None:
    """Return why there can be no lab here, None if there can."""
    if os.geteuid() != 0:
        return "Slurm's daemons need root"
    missing = [command for command in COMMANDS if shutil.which(command) is None]
    if missing:
        return f"{', '.join(missing)} not installed (apt-get install {PACKAGES})"
    probe = subprocess.run(["unshare", *ISOLATED, "true"], capture_output=True, check=False)
    return f"no namespaces: {probe.stderr.decode().strip()}" if probe.returncode else None


class Lab:
    """A running Slurm; a context manager.

    Attributes:
        folder: holds its state and logs.
        environment: for commands that talk to it, without variables of other jobs or launchers.
    """

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # short: sockets live in it
        self.environment = {
            name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)
        }
        self.environment["SLURM_CONF"] = str(self.folder / "slurm.conf")
        self.environment["TMPDIR"] = str(self.folder / "tmp")
        # The nodes share the cores that each of them counts as its own.
        self.environment["OMP_NUM_THREADS"] = "1"
        self._daemons: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Lab:
        try:
            self._configure()
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _configure(self) -> None:
        self.folder.chmod(0o755)
        for name in ("state", "tmp", *NODES, *(f"tmp.{node}" for node in NODES)):
            (self.folder / name).mkdir()
        for node in NODES:
            (self.folder / f"boot_id.{node}").touch()
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        ports = free_ports(1 + len(NODES))
        nodes = "\n".join(
            f"NodeName={node} NodeAddr=127.0.0.1 Port={port} CPUs={CPUS} Gres=gpu:{GPUS}"
            for node, port in zip(NODES, ports[1:], strict=True)
        )
        config = CONFIG.format(
            host=socket.gethostname(), folder=self.folder, ports=ports, nodes=nodes
        )
        (self.folder / "slurm.conf").write_text(config, encoding="utf-8")
        # To Slurm a GPU is a device file.
        for number in range(GPUS):
            (self.folder / f"gpu{number}").symlink_to("/dev/null")
        gpus = f"NodeName={','.join(NODES)} Name=gpu File={self.folder}/gpu[0-{GPUS - 1}]\n"
        (self.folder / "gres.conf").write_text(gpus, encoding="utf-8")
        hosts = f"127.0.0.1 {' '.join(NODES)}\n{Path('/etc/hosts').read_text(encoding='utf-8')}"
        (self.folder / "hosts").write_text(hosts, encoding="utf-8")

    def _start(self) -> None:
        folder = self.folder
        self._daemon(
            *("munged", "--foreground", "--force"),
            *(f"--key-file={folder}/munge.key", f"--socket={folder}/munge.socket"),
            *(f"--pid-file={folder}/munge.pid", f"--seed-file={folder}/munge.seed"),
            f"--log-file={folder}/munge.log",
        )
        wait_for((folder / "munge.socket").exists, "munged")
        config = f"{folder}/slurm.conf"
        self._daemon("slurmctld", "-D", "-f", config)
        for node in NODES:
            inside = ("slurmd", "-D", "-N", node, "-f", config)
            self._daemon("unshare", *ISOLATED, "bash", "-c", NODE, node, str(folder), *inside)
        try:
            wait_for(lambda: self._states() == ["idle"] * len(NODES), "idle nodes")
        except TimeoutError as error:
            logs = (path.read_text(errors="replace") for path in sorted(folder.glob("*.log")))
            raise TimeoutError(f"{error}:\n{''.join(logs)}") from error

    def _daemon(self, *command: str) -> None:
        with (self.folder / f"{len(self._daemons)}-{command[0]}.log").open("wb") as log:
            self._daemons.append(
                subprocess.Popen(
                    # Whatever ends the tests ends the daemons.
                    ("setpriv", "--pdeathsig", "KILL", *command),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=self.environment,
                    start_new_session=True,
                )
            )

    def _states(self) -> list[str]:
        return self.run("sinfo", "-h", "-N", "-o", "%T").stdout.split()

    def run(
        self,
        *command: str,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        timeout: float = JOB_SECONDS,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command that talks to this Slurm, such as srun, to its end."""
        return subprocess.run(
            command,
            cwd=cwd,
            env={**self.environment, **(env or {})},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    def submit(self, script: str, *options: str, cwd: Path) -> str:
        """Submit a batch script and return the id of its job; its output goes to `cwd`/out."""
        (cwd / "job.sh").write_text(f"#!/bin/bash\n{script}\n", encoding="utf-8")
        submitted = self.run(
            *("sbatch", "--parsable", "--output=out", "--open-mode=append"),
            *(*options, "job.sh"),
            cwd=cwd,
        )
        assert submitted.returncode == 0, submitted.stderr
        return submitted.stdout.strip()

    def jobs(self) -> list[str]:
        """Return the ids of all jobs that are not over."""
        return self.run("squeue", "-h", "-o", "%i").stdout.split()

    def wait_until_over(self, job: str) -> None:
        """Return once a job is over."""
        wait_for(lambda: job not in self.jobs(), "end of the job")

    def processes(self, title: str) -> list[psutil.Process]:
        """Return the processes of both nodes that call themselves so."""
        daemons = (psutil.Process(daemon.pid) for daemon in self._daemons)
        below = [child for daemon in daemons for child in daemon.children(recursive=True)]
        found = []
        for process in below:
            with suppress(psutil.Error):
                if " ".join(process.cmdline()).startswith(title):
                    found.append(process)
        return found

    def cancel_all(self) -> None:
        """End all jobs and wait until they are gone."""
        if self.jobs():
            self.run("scancel", "--user=root")
            wait_for(lambda: not self.jobs(), "end of all jobs")

    def close(self) -> None:
        """End every process of the lab, its jobs included, and remove its folder."""
        # A slurmd is the first process of its process table: with it ends the whole table.
        for daemon in reversed(self._daemons):
            daemon.kill()
            daemon.wait()
        shutil.rmtree(self.folder, ignore_errors=True)
