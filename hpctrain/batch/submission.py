"""Job scripts written to a file, and handed to the batch system."""

from __future__ import annotations

import re
import secrets
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from hpctrain.batch.job_script import Job
from hpctrain.batch.quoting import path_word
from hpctrain.errors import LaunchError, UsageError
from hpctrain.utils.batch_job import ascii_id
from hpctrain.utils.text import ranges


def write(path: Path, text: str) -> None:
    """Write a script, executable.

    Raises:
        UsageError: if that is not possible.
    """
    if path.exists() and not path.is_file():
        raise UsageError(f"--output {path}: is not a file; without --output the script is printed")
    try:
        path.write_text(text, encoding="utf-8")
        path.chmod(0o755)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class _Submission:
    """How one batch system takes jobs.

    Attributes:
        command: command line without the script.
        after: options that let a job start when others have ended, however they did.
        telling: options that give a job variables beside those of its own.
        from_stdin: the script is read from standard input, not named.
        job: finds the job's id in what the command prints.
    """

    command: tuple[str, ...]
    after: Callable[[Sequence[str]], tuple[str, ...]]
    telling: Callable[[str], tuple[str, ...]]
    from_stdin: bool = False
    job: re.Pattern[str]


_SUBMISSIONS = {
    "slurm": _Submission(
        command=("sbatch", "--parsable"),
        after=lambda jobs: (f"--dependency=afterany:{':'.join(jobs)}",),
        telling=lambda variables: (f"--export=ALL,{variables}",),
        job=re.compile(r"^(\d+)", re.MULTILINE),
    ),
    "lsf": _Submission(
        command=("bsub",),
        after=lambda jobs: ("-w", " && ".join(f"ended({job})" for job in jobs)),
        telling=lambda variables: ("-env", f"all,{variables}"),
        from_stdin=True,
        job=re.compile(r"^Job <(\d+)> is submitted", re.MULTILINE),
    ),
    "pbs": _Submission(
        command=("qsub",),
        after=lambda jobs: ("-W", f"depend=afterany:{':'.join(jobs)}"),
        telling=lambda variables: ("-v", variables),
        job=re.compile(r"^(\d+\S*)$", re.MULTILINE),
    ),
    "flux": _Submission(
        command=("flux", "batch"),
        after=lambda jobs: tuple(f"--dependency=afterany:{job}" for job in jobs),
        telling=lambda variables: tuple(f"--env={each}" for each in variables.split(",")),
        # A jobid in base 58, whose f has a hook where the locale has it.
        job=re.compile(r"^([f\u0192]\w+)$", re.MULTILINE),
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Array:
    """What one submission has of a job array.

    Attributes:
        options: of the batch system's command.
        variables: NAME=VALUE, of its jobs.
        elements: of the sweep's array that it has.
    """

    options: tuple[str, ...] = ()
    variables: tuple[str, ...] = ()
    elements: tuple[int, ...] = ()


def arrays_of(job: Job, elements: Sequence[int]) -> list[Array]:
    """Return the submissions that have these elements of a sweep's array, and no others.

    PBS has ranges of indices only: what stands alone is a job by itself. Flux has no arrays.
    """
    every = tuple(sorted(elements))
    if job.scheduler == "flux":
        return [_alone(element) for element in every]
    if job.scheduler == "slurm":
        return [Array(options=(f"--array={job.array(every)}",), elements=every)]
    if job.scheduler == "lsf":
        return [Array(options=("-J", job.array(every)), elements=every)]
    limit = f"%{job.throttle}" if job.throttle else ""
    arrays = []
    for part in ranges(every, to="-"):
        first, _, last = part.partition("-")
        if last:
            held = tuple(range(int(first), int(last) + 1))
            arrays.append(Array(options=("-J", part + limit), elements=held))
        else:
            arrays.append(_alone(int(part)))
    return arrays


def _alone(element: int) -> Array:
    """Return the submission of one element as a job by itself."""
    return Array(variables=(f"HPCTRAIN_POINT={element}",), elements=(element,))


def element_jobs(scheduler: str, arrays: Sequence[Array], jobs: Sequence[str]) -> dict[int, str]:
    """Return the job of each element, as the scheduler names it: the last that was submitted.

    Args:
        scheduler: that has taken them.
        arrays: what was submitted together.
        jobs: ids that `submit` has returned.
    """
    found = {}
    for array, job in zip(arrays, jobs[-len(arrays) :], strict=True):
        for element in array.elements:
            if scheduler == "slurm":
                found[element] = f"{job}_{element}"
            elif scheduler == "lsf":
                found[element] = f"{job}[{element + 1}]"
            else:
                found[element] = job.replace("[]", f"[{element}]")
    return found


def submit(
    script: Path, scheduler: str, chain: int = 1, arrays: Sequence[Array] = (Array(),)
) -> list[str]:
    """Submit a script so many times, each job after the one before; return the jobs' ids.

    Args:
        script: of the job.
        scheduler: that takes it.
        chain: how many times.
        arrays: what is submitted together each time.

    Raises:
        LaunchError: if the batch system is not here, or does not take it; the message names the
            jobs that it has taken.
    """
    submission = _SUBMISSIONS[scheduler]
    jobs: list[str] = []
    before: list[str] = []
    token = f"chain-{secrets.token_hex(8)}"
    for attempt in range(1, chain + 1):
        last, before = before, []
        for array in arrays:
            variables = list(array.variables)
            if chain > 1:
                variables += [f"HPCTRAIN_TOKEN={token}", f"HPCTRAIN_ATTEMPT={attempt}"]
            options = [*array.options, *(submission.after(last) if last else ())]
            if variables:
                options += submission.telling(",".join(variables))
            before.append(_submit_once(script, submission, options, taken=[*jobs, *before]))
        jobs += before
    return jobs


def _submit_once(
    script: Path, submission: _Submission, options: Sequence[str], taken: Sequence[str]
) -> str:
    """Submit a script, and return the id of the job."""
    named = () if submission.from_stdin else (path_word(str(script)),)
    command = (*submission.command, *options, *named)
    try:
        result = subprocess.run(
            command,
            input=script.read_text(encoding="utf-8") if submission.from_stdin else "",
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError as error:
        problem = error.strerror or str(error)
    else:
        found = submission.job.search(result.stdout)
        if result.returncode == 0 and found is not None:
            return ascii_id(found[1])
        problem = (result.stderr or result.stdout).strip() or f"code {result.returncode}"
    before = f" (submitted before: {' '.join(taken)})" if taken else ""
    raise LaunchError(f"cannot submit {script} by {' '.join(command)}{before}: {problem}")
