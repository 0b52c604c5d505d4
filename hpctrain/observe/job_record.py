"""What one job of a run was: `jobs/<n>.json` in the run folder. For rank 0 only.

It says what ran, where, when and how it ended, so that somebody can tell years later what a
checkpoint was made by. Threads gather it beside the training, and nothing waits for them for long:
git may hang, a file system may be slow, and none of that is a reason for a job to fail. Packages,
driver, image and variables are read from files; no program is started for them.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import re
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from hpctrain.observe.code import Modules, modules_now, repository_at, root_of, user_modules
from hpctrain.observe.redacting import is_secret
from hpctrain.utils.files import names_in, replace_file
from hpctrain.utils.json_files import SMALL, parse_json, read_whole
from hpctrain.utils.permissions import explained, follow_folder

logger = logging.getLogger("hpctrain")

FOLDER = "jobs"

VERSION = 1
"""Of the format of a record."""

_MOST_REPOSITORIES = 4
_MOST_BYTES = 8 * SMALL
"""Of a record, most of which are differences of code from its commit."""

_PATIENCE_SECONDS = 2.0
"""How long a job waits for its record at most, where a header or the end could do without it."""

VARIABLES = (
    "CONDA_PREFIX",
    "CUDA_DEVICE_ORDER",
    "CUDA_LAUNCH_BLOCKING",
    "CUDA_VISIBLE_DEVICES",
    "CUBLAS_WORKSPACE_CONFIG",
    "GLOO_SOCKET_IFNAME",
    "GOMP_CPU_AFFINITY",
    "HDF5_PLUGIN_PATH",
    "HDF5_USE_FILE_LOCKING",
    "HIP_VISIBLE_DEVICES",
    "LD_LIBRARY_PATH",
    "LD_PRELOAD",
    "LOADEDMODULES",
    "LSB_JOBID",
    "LSB_JOBINDEX",
    "LSB_MCPU_HOSTS",
    "LSB_QUEUE",
    "MALLOC_ARENA_MAX",
    "MASTER_ADDR",
    "MASTER_PORT",
    "MKL_NUM_THREADS",
    "NVIDIA_TF32_OVERRIDE",
    "OPENBLAS_NUM_THREADS",
    "PBS_JOBID",
    "PBS_JOBNAME",
    "PBS_QUEUE",
    "PYTHONHASHSEED",
    "PYTHONPATH",
    "ROCR_VISIBLE_DEVICES",
    "SLURM_ARRAY_JOB_ID",
    "SLURM_ARRAY_TASK_ID",
    "SLURM_CLUSTER_NAME",
    "SLURM_CPUS_PER_TASK",
    "SLURM_CPU_BIND",
    "SLURM_GPUS_ON_NODE",
    "SLURM_GPUS_PER_NODE",
    "SLURM_GPUS_PER_TASK",
    "SLURM_JOB_ID",
    "SLURM_JOB_NAME",
    "SLURM_JOB_NODELIST",
    "SLURM_JOB_NUM_NODES",
    "SLURM_JOB_PARTITION",
    "SLURM_MPI_TYPE",
    "SLURM_NTASKS",
    "SLURM_NTASKS_PER_NODE",
    "SLURM_RESTART_COUNT",
    "SLURM_SUBMIT_DIR",
    "TMPDIR",
    "VIRTUAL_ENV",
    "ZE_AFFINITY_MASK",
)
"""Variables that a record may hold, one by one: many others carry tokens and passwords."""

FAMILIES = (
    "FI_",
    "I_MPI_",
    "KMP_",
    "MPICH_",
    "MPIR_CVAR_",
    "NCCL_",
    "OMPI_MCA_",
    "OMP_",
    "PYTORCH_",
    "RCCL_",
    "TORCH_",
    "TORCHINDUCTOR_",
    "UCX_",
)
"""Beginnings of names of settings of libraries, of which there are too many to list."""

_PACKAGE = re.compile(r"(?P<name>[\w.]+)-(?P<version>[\w.!+]+)(-py[\d.]+.*)?\.(dist|egg)-info")

_LONGEST_VALUE = 4096

_IMAGES = (
    "APPTAINER_CONTAINER",
    "SINGULARITY_CONTAINER",
    "SHIFTER_IMAGEREQUEST",
    "SLURM_CONTAINER_IMAGE",
)


class JobRecord:
    """The record of this job, written anew whenever more is known.

    Attributes:
        number: of the job among those of the run, from 1; None: it could not be taken.
    """

    def __init__(self, run_folder: Path) -> None:
        """Prepare; nothing is written before `begin`.

        Args:
            run_folder: of the run; its lease is held by this job.
        """
        self.number: int | None = None
        self._folder = run_folder / FOLDER
        self._lock = threading.Lock()
        self._about: dict[str, Any] = {"version": VERSION}
        self._modules: Modules | None = None
        self._gathering: threading.Thread | None = None
        self._reading: threading.Thread | None = None

    def begin(self, facts: Mapping[str, Any]) -> None:
        """Take a number, and start to gather the rest.

        Args:
            facts: that are known by now, as JSON.
        """
        try:
            self._folder.mkdir(exist_ok=True)
            follow_folder(self._folder)
            taken = [
                int(path.stem) for path in self._folder.glob("*.json") if path.stem.isdecimal()
            ]
        except OSError as error:
            logger.warning(
                "this job leaves no record: %s: %s", self._folder, explained(error, self._folder)
            )
            return
        # Only one job at a time holds the run, so nobody else takes the same.
        self.number = max(taken, default=0) + 1
        self._about |= {"number": self.number, **facts, "end": None, "reason": "running"}
        self._gathering = _started(self._add, self._note_surroundings, self._note_repositories)

    def note_modules(self) -> None:
        """Begin to read the user's modules that are imported by now."""
        self._reading = _started(self._read_modules)

    def modules(self) -> Modules | None:
        """Return those modules; None where their files cannot be read soon."""
        reading, self._reading = self._reading, None
        _wait(reading)  # once, not at every save
        return self._modules

    def checkpoint_note(self) -> dict[str, Any]:
        """Return what a checkpoint says of the job that saves it."""
        return {"job": self.number, "modules": self.modules()}

    def end(self, **facts: Any) -> None:
        """Note how the job has ended. Waits only a moment for what is still being gathered."""
        if self.number is None:
            return
        self.modules()
        _wait(self._gathering)
        _wait(_started(lambda: self._add(end=timestamp(), **facts)))

    def _note_surroundings(self) -> None:
        self._add(
            packages=packages(),
            system=system(),
            driver=driver(),
            image=image(os.environ),
            variables=variables(os.environ),
        )

    def _note_repositories(self) -> None:
        places = [Path.cwd(), *(path.parent for path in user_modules().values())]
        roots = dict.fromkeys(root for place in places if (root := root_of(place)) is not None)
        found = [asdict(repository_at(root)) for root in list(roots)[:_MOST_REPOSITORIES]]
        # That of the current directory is the project, where it is in one.
        self._add(git=found[0] if found else None, other_repositories=found[1:])

    def _read_modules(self) -> None:
        self._modules = modules_now()
        if self.number is not None:
            self._add(modules=self._modules)

    def _add(self, **facts: Any) -> None:
        with self._lock:
            self._about |= facts
            content = json.dumps(self._about, indent=1) + "\n"
            replace_file(self._folder / f"{self.number}.json", content.encode())


def timestamp(seconds: float | None = None) -> str:
    """Return a time, such as 2026-11-28T15:04:05+01:00; None: now."""
    moment = datetime.now() if seconds is None else datetime.fromtimestamp(seconds)
    return moment.astimezone().isoformat(timespec="seconds")


@dataclass(frozen=True, slots=True)
class JobTime:
    """When a job of a run was there, in seconds since 1970.

    Attributes:
        nodes: how many it had.
        end: None where it is not known: it runs, or was killed.
    """

    number: int
    nodes: int
    begin: float
    end: float | None

    @property
    def node_seconds(self) -> float:
        return 0.0 if self.end is None else self.nodes * max(0.0, self.end - self.begin)


def job_times(run_folder: Path) -> list[JobTime]:
    """Return the jobs of a run by number; of a damaged record no time is known."""
    found = []
    for path in (run_folder / FOLDER / name for name in names_in(run_folder / FOLDER)):
        if path.suffix != ".json" or not path.stem.isdecimal():
            continue
        number, nodes, begin, end = int(path.stem), 1, 0.0, None
        with suppress(OSError, ValueError, TypeError, KeyError):  # damaged, or not ours to read
            record = parse_json(read_whole(path, _MOST_BYTES))
            nodes = len(record["nodes"])
            begin = datetime.fromisoformat(record["start"]).timestamp()
            ended = record["end"]
            end = None if ended is None else datetime.fromisoformat(ended).timestamp()
        found.append(JobTime(number, nodes, begin, end))
    return sorted(found, key=lambda job: job.number)


def node_hours(jobs: Sequence[JobTime]) -> tuple[float, int] | None:
    """Return the node-hours that jobs have used, and how many have no end. None: no job.

    Those run, or were killed.
    """
    if not jobs:
        return None
    return sum(job.node_seconds for job in jobs) / 3600, sum(job.end is None for job in jobs)


def _started(*works: Callable[[], None]) -> threading.Thread | None:
    """Do works in a thread that the job may leave behind; where one fails, that is only reported.

    Returns:
        The thread; None where there can be no more of them.
    """

    def run() -> None:
        for work in works:
            try:
                work()
            except Exception as error:  # noqa: BLE001 - a record is no reason for a job to fail
                with suppress(Exception):
                    logger.warning("the record of this job is not complete: %s", error)

    thread = threading.Thread(target=run, name="hpctrain-record", daemon=True)
    try:
        thread.start()
    except RuntimeError as error:  # a limit of processes
        logger.warning("the record of this job is not complete: %s", error)
        return None
    return thread


def _wait(thread: threading.Thread | None) -> None:
    if thread is not None:
        thread.join(_PATIENCE_SECONDS)


def variables(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that say how a job is set up, and none that could open a door."""
    return {
        name: value[:_LONGEST_VALUE]
        for name, value in sorted(environ.items())
        if (name in VARIABLES or name.startswith(FAMILIES)) and not is_secret(name, value)
    }


def packages() -> dict[str, str]:
    """Return the versions of the installed packages by name, as the names of folders say them.

    `importlib.metadata` would read a file of each, hundreds of files of a busy file system.
    """
    found: dict[str, str] = {}
    for folder in sys.path:
        with suppress(OSError), os.scandir(folder or ".") as entries:
            for entry in entries:
                match = _PACKAGE.fullmatch(entry.name)
                if match is not None:
                    # As imports do: what comes first on the path hides what comes later.
                    found.setdefault(match["name"].lower().replace("_", "-"), match["version"])
    return dict(sorted(found.items()))


def system() -> dict[str, str]:
    """Return the operating system and the processor's architecture."""
    return {
        "kernel": f"{platform.system()} {platform.release()}",
        "machine": platform.machine(),
        "python": platform.python_version(),
        "executable": sys.executable,
    }


def driver(proc: Path = Path("/proc"), modules: Path = Path("/sys/module")) -> str | None:
    """Return the version of the GPU's driver; None without one."""
    with suppress(OSError):
        text = (proc / "driver/nvidia/version").read_text(encoding="utf-8", errors="replace")
        if (match := re.search(r"\s(\d+\.\d+(?:\.\d+)?)\s", text)) is not None:
            return f"NVIDIA {match[1]}"
    for name, maker in (("amdgpu", "AMD"), ("i915", "Intel"), ("xe", "Intel")):
        with suppress(OSError):
            version = (modules / name / "version").read_text(encoding="utf-8").strip()
            return f"{maker} {version}"
    return None


def image(environ: Mapping[str, str], root: Path = Path("/")) -> str | None:
    """Return the image of the container that this process is in; None outside of one."""
    for name in _IMAGES:
        if environ.get(name):
            return environ[name]
    with suppress(OSError):
        text = (root / "run/.containerenv").read_text(encoding="utf-8", errors="replace")
        match = re.search(r'^image="(.*)"$', text, re.MULTILINE)
        return match[1] if match is not None else "podman, an image that it does not name"
    if (root / ".dockerenv").exists():
        return "docker, an image that it does not name"
    return None
