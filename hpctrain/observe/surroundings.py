"""What a job runs in: packages, driver, image, variables. Files only, no program is started."""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

_PACKAGE = re.compile(r"(?P<name>[\w.]+)-(?P<version>[\w.!+]+)(-py[\d.]+.*)?\.(dist|egg)-info")

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

_SECRET_NAME = re.compile(r"TOKEN|PASS|SECRET|KEY|CRED|AUTH|COOKIE|PRIVATE|SIGN|JWT", re.IGNORECASE)
_SECRET_VALUE = re.compile(r"://[^/\s]*@|\bBearer\b|-----BEGIN", re.IGNORECASE)
_SECRET_WORD = re.compile(
    r"((?:^|[\W_])(?:token|password|passwd|secret|credentials?|(?:api|access|secret)_?key)\s*=).*",
    re.IGNORECASE | re.DOTALL,
)
_LONGEST_VALUE = 4096
_HIDDEN = "(not recorded)"

_IMAGES = (
    "APPTAINER_CONTAINER",
    "SINGULARITY_CONTAINER",
    "SHIFTER_IMAGEREQUEST",
    "SLURM_CONTAINER_IMAGE",
)


def variables(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that say how a job is set up, and none that could open a door."""
    return {
        name: value[:_LONGEST_VALUE]
        for name, value in sorted(environ.items())
        if (name in VARIABLES or name.startswith(FAMILIES))
        and not _SECRET_NAME.search(name)
        and not _SECRET_VALUE.search(value)
    }


def without_secrets(words: list[str]) -> list[str]:
    """Return a command line with what looks like a secret in it left out."""
    hidden = [_SECRET_WORD.sub(rf"\1{_HIDDEN}", word) for word in words]
    return [_HIDDEN if _SECRET_VALUE.search(word) else word for word in hidden]


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
