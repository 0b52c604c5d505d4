"""What the environment of each launcher makes of a process; recorded, or from its documentation."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from helpers.environments import ENVIRONMENTS, recorded

from hpctrain.errors import LaunchError
from hpctrain.launch.environment import Claim, ancestors, detect, without_rank
from hpctrain.launch.launchers import LAUNCHERS, library_family, library_name
from hpctrain.launch.mpi import check_process_manager
from hpctrain.launch.reporter import may_report


def told(claim: Claim) -> tuple[str | None, int | None, int | None, int | None, int | None]:
    name = claim.launcher.name if claim.launcher else None
    return name, claim.rank, claim.world_size, claim.local_rank, claim.local_world_size


ALONE = (None, 0, 1, 0, 1)
CLAIMS = {
    # launcher, rank, world size, local rank and local world size as it tells them
    "mpich": ("mpich", 2, 3, 2, 3),
    "gforker": ("pmi", 1, 2, None, None),
    "intelmpi": ("intelmpi", 2, 3, 2, 3),
    "mvapich2": ("mvapich2", 3, 4, 1, 2),
    "openmpi": ("openmpi", 2, 3, 1, 3),
    "prterun": ("prrte", 1, None, None, None),
    "sbatch-mpich": ("mpich", 3, 4, 1, 2),
    "sbatch-intelmpi": ("intelmpi", 3, 4, 1, 2),
    "sbatch-openmpi": ("openmpi", 3, 4, 1, 2),
    "jsrun": ("jsrun", 7, 12, 1, 6),
    "pals": ("pals", 5, 8, 1, 4),
    "pals-without-pmi": ("pals", 5, None, 1, 4),
    "aprun": ("alps", 5, None, None, None),
    "flux": ("flux", 6, 8, 2, None),
    "srun-pmi2": ("srun", 3, 4, 1, None),
    "srun-pmi2-cyclic": ("srun", 2, 4, 1, None),
    "srun-pmix-uneven": ("srun", 2, 3, 0, None),
    "srun-none": ("srun", 1, 4, 1, None),
    "srun-cray-shasta": ("srun", 0, 3, 0, None),
    "srun-heterogeneous": ("srun", 3, 4, 1, None),
    "srun-second-node": ("srun", 1, 2, 1, None),
    "srun-shell": ALONE,
    # a claim of another step's place, which check_process_manager refuses
    "sbatch-by-a-rank": ("srun", 0, 2, 0, None),
    "sbatch": ALONE,
    "salloc": ALONE,
    "torchrun": ("torchrun", 2, 3, 2, 3),
    "torchrun-in-mpich": ("torchrun", 2, 3, 2, 3),
    "kubeflow": ("kubeflow", 2, 4, None, None),
    "by-hand": ("environment", 1, 2, None, None),
}


@pytest.mark.parametrize("name", list(CLAIMS))
def test_a_recorded_environment(name: str) -> None:
    env = recorded(name)
    claim = detect(env)
    assert told(claim) == CLAIMS[name]
    assert {"rank"} <= set(claim.reasons)
    assert claim.needs_mpi == (
        claim.launcher is not None
        and claim.launcher.name not in ("torchrun", "kubeflow", "environment")
    )


def test_every_recorded_environment_has_a_test() -> None:
    nested = {name for name, _, _ in NESTINGS}
    names = {path.stem for path in ENVIRONMENTS.glob("*.env")}
    assert names == set(CLAIMS) | nested | {"lightning", "kubeflow-trainer"}


def test_no_launcher() -> None:
    assert told(detect({})) == ALONE
    assert detect({}).reasons["rank"] == "no launcher in the environment"


HYDRA, PRRTE, SLURM, ELASTIC = "hydra_pmi_proxy", "prterun", "slurmstepd", "pt_elastic"
NESTINGS = [
    # environment, names of the processes above, the nearest first; launcher, rank, world size
    ("mpich-in-openmpi", ["bash", HYDRA, "mpirun", PRRTE, "bash"], ("mpich", 2, 3)),
    ("openmpi-in-mpich", ["bash", PRRTE, HYDRA, "mpirun", "bash"], ("openmpi", 2, 3)),
    ("torchrun-in-mpich", ["bash", ELASTIC, HYDRA, "mpirun"], ("torchrun", 2, 3)),
    ("mpich-in-torchrun", ["bash", HYDRA, "mpirun", ELASTIC], ("mpich", 2, 3)),
    ("torchrun-in-mpich", ["python", "torch.distributed.run", HYDRA], ("torchrun", 2, 3)),
    ("sbatch-openmpi", ["prted", SLURM], ("openmpi", 3, 4)),
    ("srun-pmi2", ["bash", SLURM, "systemd"], ("srun", 3, 4)),
    ("jsrun", ["jsmd"], ("jsrun", 7, 12)),
    ("pals", ["palsd"], ("pals", 5, 8)),
    ("flux", ["flux-shell", "flux-broker-0", SLURM], ("flux", 6, 8)),
    # Open MPI 4 and Spectrum: mpirun itself, whatever it is a link to
    ("openmpi-in-mpich", ["orterun", HYDRA, "mpiexec.hydra"], ("openmpi", 2, 3)),
    ("openmpi-in-mpich", ["mpirun", HYDRA, "mpiexec.hydra"], ("openmpi", 2, 3)),
    ("mpich-in-openmpi", ["bash", HYDRA, "mpirun", "orterun"], ("mpich", 2, 3)),
]


@pytest.mark.parametrize(("name", "above", "expected"), NESTINGS)
def test_the_nearest_launcher_wins(
    name: str, above: list[str], expected: tuple[str, int, int]
) -> None:
    assert told(detect(recorded(name), above))[:3] == expected


@pytest.mark.parametrize(
    ("outer", "inner", "above", "launcher"),
    [
        # srun's daemon, not an ancestor of its tasks' launcher, hides the launcher it was called by
        ("openmpi", "srun-pmi2", [SLURM, "systemd"], "srun"),
        ("mpich", "srun-pmix-uneven", [SLURM, "systemd"], "srun"),
        ("srun-pmi2", "mpich", [HYDRA, "mpirun", SLURM], "mpich"),
        ("srun-pmix-uneven", "prterun", ["prted", SLURM], "prrte"),
        ("srun-pmi2", "torchrun", [ELASTIC, SLURM], "torchrun"),
        ("srun-pmi2", "flux", ["flux-shell"], "flux"),
        ("pals", "torchrun", [ELASTIC, "palsd"], "torchrun"),
        ("jsrun", "mpich", [HYDRA, "mpirun", "jsmd"], "mpich"),
        # without the process tree: in a container, or where it is hidden
        ("srun-pmi2", "mpich", [], "mpich"),
        ("srun-pmix-uneven", "openmpi", [], "openmpi"),
        ("srun-pmi2", "torchrun", [], "torchrun"),
        ("openmpi", "torchrun", [], "torchrun"),
        ("kubeflow", "torchrun", [], "torchrun"),
        ("srun-pmi2", "by-hand", [SLURM], None),
        # an interactive shell on a node is a step of one task
        ("srun-shell", "openmpi", ["orterun", "bash", SLURM], "openmpi"),
        ("srun-shell", "openmpi", ["bash", SLURM], None),
        ("srun-shell", "mpich", ["unheard-of", "bash", SLURM], None),
        ("srun-shell", "by-hand", ["bash", SLURM], None),
        ("srun-shell", "kubeflow", [SLURM], None),
        ("srun-shell", "pals-without-pmi", ["bash", SLURM], None),
    ],
)
def test_launchers_inside_launchers(
    outer: str, inner: str, above: list[str], launcher: str | None
) -> None:
    env = recorded(outer) | recorded(inner)
    if launcher is None:
        with pytest.raises(LaunchError, match="two launchers disagree"):
            detect(env, above)
    else:
        assert told(detect(env, above))[0] == launcher


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        ("openmpi", "mpich-in-openmpi", "Open MPI's mpirun says OMPI_COMM_WORLD_RANK=1"),
        ("mpich", "by-hand", "RANK and WORLD_SIZE in the environment RANK=1"),
        ("intelmpi", "kubeflow", "Kubeflow's PyTorchJob WORLD_SIZE=4"),
        ("openmpi", "jsrun", None),  # Spectrum MPI: the same values twice
        ("flux", "openmpi", "disagree"),
    ],
)
def test_launchers_that_disagree(first: str, second: str, words: str | None) -> None:
    env = recorded(first) | recorded(second)
    if words is None:
        assert told(detect(env))[0] == "jsrun"
        return
    with pytest.raises(LaunchError, match="two launchers disagree") as caught:
        detect(env)
    assert words in str(caught.value)
    assert "env -u" in str(caught.value)
    assert caught.value.everywhere


@pytest.mark.parametrize("name", ["mpich", "openmpi", "srun-none"])
def test_rank_and_world_size_copied_from_the_launcher_agree(name: str) -> None:
    """What many job scripts and container hooks export."""
    claim = detect(recorded(name))
    copied = {"RANK": str(claim.rank), "WORLD_SIZE": str(claim.world_size)}
    assert told(detect(recorded(name) | copied)) == told(claim)


MPICH = "MPICH Version:      5.0.2\nMPICH configure:    --with-device=ch4:ucx,ofi\n"
INTEL = "Intel(R) MPI Library 2021.19.0 for Linux* OS"


@pytest.mark.parametrize(
    ("name", "changes", "version", "words"),
    [
        ("sbatch-by-a-rank", {}, MPICH, "step 10.0 of Slurm, but PMI_JOBID is of step 9.0"),
        ("srun-pmix-uneven", {"SLURM_JOB_ID": "99"}, "Open MPI v5", "PMIX_NAMESPACE is of step"),
        ("srun-pmix-uneven", {}, MPICH, "srun speaks PMIx to this process"),
    ],
)
def test_what_mpi_init_would_die_of_is_explained(
    name: str, changes: dict[str, str], version: str, words: str
) -> None:
    env = recorded(name) | changes
    launcher = detect(env).launcher
    assert launcher is not None
    with pytest.raises(LaunchError, match=words):
        check_process_manager(launcher, env, version)


@pytest.mark.parametrize(
    ("name", "changes", "version"),
    [
        ("srun-pmi2-cyclic", {}, MPICH),
        ("srun-pmix-uneven", {}, MPICH[:-1] + " --with-pmix=/usr"),
        ("srun-pmix-uneven", {}, INTEL),
        # A PMI of this step overrules a namespace that was inherited.
        ("srun-pmi2-cyclic", {"PMIX_NAMESPACE": "slurm.pmix.99.0", "PMIX_RANK": "1"}, INTEL),
        ("srun-heterogeneous", {"SLURM_JOB_ID": "7"}, "Open MPI v5"),
        # Newer Slurm's cray_shasta names the job alone.
        ("srun-cray-shasta", {"PMI_JOBID": "4", "PMI_RANK": "0"}, "CRAY MPICH version 8"),
        ("sbatch-openmpi", {}, "Open MPI v5"),
    ],
)
def test_a_process_manager_that_fits(name: str, changes: dict[str, str], version: str) -> None:
    env = recorded(name) | changes
    launcher = detect(env).launcher
    assert launcher is not None
    check_process_manager(launcher, env, version)


def test_every_value_has_its_reason() -> None:
    assert detect(recorded("mpich")).reasons == {
        "rank": "PMI_RANK=2",
        "world_size": "PMI_SIZE=3",
        "local_rank": "MPI_LOCALRANKID=2",
        "local_world_size": "MPI_LOCALNRANKS=3",
    }


@pytest.mark.parametrize(
    ("name", "changes", "words", "everywhere"),
    [
        ("mpich", {"PMI_RANK": "3"}, "PMI_RANK=3 and PMI_SIZE=3 contradict", False),
        ("mpich", {"PMI_RANK": "4"}, "PMI_RANK=4 and PMI_SIZE=3 contradict", True),
        ("mpich", {"PMI_RANK": "-1"}, "PMI_RANK='-1' is not a whole number", False),
        ("mpich", {"PMI_RANK": ""}, "PMI_RANK='' is not a whole number", False),
        ("mpich", {"PMI_SIZE": "four"}, "PMI_SIZE='four' is not a whole number", True),
        ("mpich", {"PMI_SIZE": "9" * 5000}, "is not a whole number", True),
        ("mpich", {"PMI_SIZE": "٣"}, "is not a whole number", True),
        ("mpich", {"PMI_SIZE": "0", "PMI_RANK": "0"}, "contradict", False),
        ("mpich", {"PMI_SIZE": None}, "PMI_SIZE is not set", True),
        ("mpich", {"MPI_LOCALRANKID": "3"}, "MPI_LOCALRANKID=3 and MPI_LOCALNRANKS=3", False),
        ("openmpi", {"OMPI_COMM_WORLD_SIZE": None}, "OMPI_COMM_WORLD_SIZE is not set", True),
        ("flux", {"FLUX_JOB_SIZE": "six"}, "FLUX_JOB_SIZE='six'", True),
        ("by-hand", {"WORLD_SIZE": None}, "RANK=1 is set, WORLD_SIZE is not", True),
        ("by-hand", {"RANK": None}, "WORLD_SIZE=2 is set, RANK is not", True),
        ("by-hand", {"RANK": "2"}, "RANK=2 and WORLD_SIZE=2 contradict", False),
        ("by-hand", {"MASTER_ADDR": None}, "MASTER_ADDR is not set", True),
        ("by-hand", {"MASTER_PORT": None}, "MASTER_PORT is not set", True),
        ("by-hand", {"MASTER_PORT": ""}, "MASTER_PORT is not set", True),
        ("by-hand", {"MASTER_PORT": "0"}, "MASTER_PORT='0' is not a port", True),
        ("by-hand", {"MASTER_PORT": "65536"}, "MASTER_PORT='65536' is not a port", True),
        ("by-hand", {"MASTER_PORT": "-1"}, "MASTER_PORT='-1' is not a port", True),
        ("by-hand", {"MASTER_PORT": "http"}, "MASTER_PORT='http' is not a port", True),
        ("kubeflow", {"PET_NPROC_PER_NODE": "4"}, "RANK is that of the pod", True),
        ("kubeflow-trainer", {}, "torchrun -m hpctrain", True),
        ("lightning", {}, "where WORLD_SIZE counts nodes", True),
    ],
)
def test_a_broken_environment_is_explained(
    name: str, changes: dict[str, str | None], words: str, everywhere: bool
) -> None:
    changed = recorded(name) | changes
    with pytest.raises(LaunchError) as caught:
        detect({key: value for key, value in changed.items() if value is not None})
    assert words in str(caught.value)
    assert caught.value.everywhere == everywhere


def test_one_process_by_hand_needs_no_meeting_point() -> None:
    assert told(detect({"RANK": "0", "WORLD_SIZE": "1"})) == ALONE


@pytest.mark.parametrize(
    ("env", "speaks"),
    [
        ({}, True),
        ({"RANK": "0", "WORLD_SIZE": "x"}, True),
        ({"RANK": "1", "WORLD_SIZE": "x"}, False),
        ({"RANK": "one", "WORLD_SIZE": "2"}, True),
        ({"OMPI_COMM_WORLD_RANK": "0", "RANK": "1", "WORLD_SIZE": "2"}, False),
    ],
)
def test_who_speaks_before_there_is_a_claim(env: dict[str, str], speaks: bool) -> None:
    assert may_report(env) == speaks


def plant(proc: Path, pid: int, parent: int, title: str, command: str, executable: str) -> None:
    """Write what /proc says of a process; without an executable it is another user's."""
    entry = proc / str(pid)
    entry.mkdir()
    (entry / "stat").write_text(f"{pid} ({title}) S {parent} 9", encoding="utf-8")
    (entry / "comm").write_text(f"{title}\n", encoding="utf-8")
    (entry / "cmdline").write_text("\0".join(command.split()), encoding="utf-8")
    if executable:
        (entry / "exe").symlink_to(executable)


DEBIANS_SLURM = ["slurmstepd-wlm", "slurmstepd"]


def test_ancestors_are_read_from_the_process_tree(tmp_path: Path) -> None:
    plant(tmp_path, 9, 7, "python", "python -m hpctrain run.toml", "")
    plant(tmp_path, 7, 5, "python3.11", "python -m torch.distributed.run -m hpctrain x.toml", "")
    plant(tmp_path, 5, 1, "a (b) c", "a", "")
    plant(tmp_path, 1, 0, "systemd", "init", "")
    expected = ("python3.11", "torch.distributed.run", "a (b) c", "systemd")
    assert ancestors(9, tmp_path) == expected
    assert ancestors(3, tmp_path) == ()
    if Path("/proc/self/exe").exists():
        show = "from hpctrain.launch.environment import ancestors; print(ancestors()[0])"
        result = subprocess.run(
            [sys.executable, "-c", show], capture_output=True, text=True, check=True
        )
        assert result.stdout.strip() == Path("/proc/self/exe").readlink().name


@pytest.mark.parametrize(
    ("title", "command", "executable", "names"),
    [
        # what the file is, not what the link to it is called
        ("mpirun", "mpirun -np 2 x", "/usr/bin/orterun", ["orterun"]),
        ("mpiexec", "mpiexec -n 2 x", "/usr/bin/mpiexec.hydra", ["mpiexec.hydra"]),
        ("mpirun", "mpirun -np 2 x", "/opt/ompi/bin/orterun (deleted)", ["orterun"]),
        ("mpirun", "mpirun x", "/nix/store/a/bin/.orterun-wrapped", ["orterun"]),
        ("x", "hydra_pmi_proxy", "/opt/intel/bin/hydra_pmi_proxy", ["hydra_pmi_proxy", "x"]),
        ("slurmstepd", "slurmstepd: [1.0]", "/usr/sbin/slurmstepd-wlm", DEBIANS_SLURM),
        # not to be read: of another user, or in a container's namespace
        ("slurmstepd", "slurmstepd: [5.0]", "", ["slurmstepd"]),
        (
            "hydra_bstrap_pr",
            "/opt/hydra_bstrap_proxy",
            "",
            ["hydra_bstrap_proxy", "hydra_bstrap_pr"],
        ),
        ("mpirun", "mpirun -np 2 x", "", ["mpirun"]),
        # scripts: a launcher's name on one is nobody's who starts ranks
        ("mpirun", "/bin/bash /opt/site/mpirun -np 2 x", "/usr/bin/bash", ["bash"]),
        ("mpiexec", "/bin/sh /opt/site/mpiexec x", "", ["sh"]),
        ("mpirun", "/usr/bin/python3 /opt/mpirun -np 2", "/usr/bin/python3.11", ["python3.11"]),
        ("jsmd", "/bin/bash /opt/jsmd x", "/usr/bin/bash", ["bash", "jsmd"]),
        (
            "pt_elastic",
            "/opt/bin/python /opt/bin/torchrun --standalone x.py",
            "/usr/bin/python3.11",
            ["python3.11", "pt_elastic", "torchrun"],
        ),
        ("accelerate", "python accelerate launch", "/opt/python3", ["python3", "accelerate"]),
        ("bash", "bash -c mpirun", "/usr/bin/bash", ["bash"]),
        ("busybox", "sh -c x", "/bin/busybox", ["busybox"]),
        ("", "", "", [""]),
    ],
)
def test_what_a_process_is_called(
    tmp_path: Path, title: str, command: str, executable: str, names: list[str]
) -> None:
    plant(tmp_path, 9, 7, "python", "python", "")
    plant(tmp_path, 7, 0, title, command, executable)
    assert list(ancestors(9, tmp_path)) == names


@pytest.mark.parametrize(
    ("version", "name", "family"),
    [
        ("MPICH Version:      5.0.2\nMPICH Release date: Tue\n\0", "MPICH 5.0.2", "mpich"),
        ("Open MPI v5.0.11, package: Open MPI, ident\0", "Open MPI v5.0.11", "openmpi"),
        ("Intel(R) MPI Library 2021.18 for Linux\n\0", "Intel(R) MPI 2021.18 for Linux", "intel"),
        ("MPI VERSION    : CRAY MPICH version 8.1.28 (ANL base)\n", None, "cray"),
        ("IBM Spectrum MPI v10.4\0", "IBM Spectrum MPI v10.4", "spectrum"),
        ("MVAPICH2 Version      :\t2.3.7\n", None, "mvapich"),
        ("Some MPI 1.0", "Some MPI 1.0", "unknown"),
    ],
)  # fmt: skip
def test_library_names(version: str, name: str | None, family: str) -> None:
    assert name is None or library_name(version) == name
    assert library_family(library_name(version)) == family


@pytest.mark.parametrize("launcher", LAUNCHERS, ids=lambda launcher: launcher.name)
def test_no_launcher_is_seen_any_more(launcher: object) -> None:
    row = LAUNCHERS[LAUNCHERS.index(launcher)]  # type: ignore[arg-type]
    told = (*row.markers, *row.rank, *row.world_size, *row.local_rank, *row.local_world_size)
    env = dict.fromkeys(told, "1")
    assert detect(without_rank(env)).launcher is None
    assert without_rank(env) == {}


def test_what_tools_of_the_job_need_stays() -> None:
    job = {
        "SLURM_JOB_ID": "7",
        "SLURM_CONF": "/etc/slurm.conf",
        "LSB_JOBID": "3",
        "PBS_JOBID": "4",
        "OMP_NUM_THREADS": "2",
        "PATH": "/bin",
    }
    protocols = {"PMI_FD": "9", "PMIX_SERVER_URI41": "x", "OMPI_MCA_ess": "y", "SLURM_PROCID": "0"}
    assert without_rank(job | protocols) == job
