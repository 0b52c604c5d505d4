"""Hands scripts to the batch system, one or a chain of them."""

from __future__ import annotations

import re
import secrets
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hpctrain.batch.quoting import path_word
from hpctrain.errors import LaunchError


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """How one batch system takes jobs.

    Attributes:
        command: without the script.
        after: options that let a job start when another has ended, however it did.
        telling: options that give a job variables beside those of its own.
        from_stdin: the script is read from standard input, not named.
        job: finds the job's id in what the command prints.
    """

    command: tuple[str, ...]
    after: Callable[[str], tuple[str, ...]]
    telling: Callable[[str], tuple[str, ...]]
    from_stdin: bool = False
    job: re.Pattern[str]


SUBMISSIONS = {
    "slurm": Submission(
        command=("sbatch", "--parsable"),
        after=lambda job: (f"--dependency=afterany:{job}",),
        telling=lambda variables: (f"--export=ALL,{variables}",),
        job=re.compile(r"^(\d+)", re.MULTILINE),
    ),
    "lsf": Submission(
        command=("bsub",),
        after=lambda job: ("-w", f"ended({job})"),
        telling=lambda variables: ("-env", f"all,{variables}"),
        from_stdin=True,
        job=re.compile(r"^Job <(\d+)> is submitted", re.MULTILINE),
    ),
    "pbs": Submission(
        command=("qsub",),
        after=lambda job: ("-W", f"depend=afterany:{job}"),
        telling=lambda variables: ("-v", variables),
        job=re.compile(r"^(\d+\S*)$", re.MULTILINE),
    ),
}


def submit(script: Path, scheduler: str, chain: int = 1) -> list[str]:
    """Submit a script so many times, each job after the one before; return the jobs' ids.

    Raises:
        LaunchError: if the batch system is not here, or does not take it; the message names the
            jobs that it has taken.
    """
    submission = SUBMISSIONS[scheduler]
    jobs: list[str] = []
    token = f"chain-{secrets.token_hex(8)}"
    for attempt in range(1, chain + 1):
        after = submission.after(jobs[-1]) if jobs else ()
        if chain > 1:
            variables = f"HPCTRAIN_TOKEN={token},HPCTRAIN_ATTEMPT={attempt}"
            after = (*after, *submission.telling(variables))
        named = () if submission.from_stdin else (path_word(str(script)),)
        command = (*submission.command, *after, *named)
        problem = ""
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
                jobs.append(found[1])
                continue
            problem = (result.stderr or result.stdout).strip() or f"code {result.returncode}"
        taken = f" (submitted before: {' '.join(jobs)})" if jobs else ""
        raise LaunchError(f"cannot submit {script} by {' '.join(command)}{taken}: {problem}")
    return jobs
