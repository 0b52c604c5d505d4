"""Kills a run at random moments, and counts how often it came back whole.

    python benchmarks/kill.py                200 moments, 2 ranks
    python benchmarks/kill.py 20 --ranks 3

SIGKILL hits a rank, mpirun, or everything at once: at a random step, in a save, around its renames,
in an evaluation, in start-up. After each, the newest whole checkpoint has to be the last save that
was asked for or the one before, and the next start has to go on from there. At the end, metrics and
model have to be those of an uninterrupted run, bit for bit. The killed run reads its data from
copies on node-local disk, of which nothing may be left.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

from hpctrain.checkpoint.format import is_whole, newest_first
from hpctrain.convert.digits import pack_digits
from hpctrain.utils.run_folder import step_of

ROOT = Path(__file__).parents[1]
SAVE_EVERY, EVALUATE_EVERY = 5, 7
STEPS_A_MOMENT = 40
CLOCKED = ("seconds", "samples_per_second", "wall_time")


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("moments", type=int, nargs="?", default=200)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    site = Path(tempfile.mkdtemp(prefix="kill-"))
    try:
        return Trial(site, asked.moments, asked.ranks, random.Random(asked.seed)).run()
    finally:
        shutil.rmtree(site, ignore_errors=True)


class Trial:
    """One run that is killed again and again, and one that is not."""

    def __init__(self, site: Path, moments: int, ranks: int, draw: random.Random) -> None:
        self.site, self.moments, self.ranks, self.draw = site, moments, ranks, draw
        self.folder, self.disk = site / "runs" / "killed", site / "disk"
        self.problems: list[str] = []
        self.worst = 0

    def run(self) -> int:
        pack_digits(self.site / "data" / "digits")
        self.disk.mkdir()
        shutil.copy(ROOT / "configs" / "run.toml", self.site / "run.toml")
        self.start("whole").wait()
        counts: Counter[str] = Counter()
        begin = time.monotonic()
        for moment in range(self.moments):
            what = self.one_moment()
            counts[what] += 1
            if what == "complete":
                break
            done = f"{moment + 1}/{self.moments} {what}, {time.monotonic() - begin:.0f} s"
            print(f"{done}: step {self.last_step()}, saved {self.saved()}", flush=True)
        self.start("killed").wait()
        killed = sum(counts.values()) - counts["complete"]
        self.compare()
        print("\n".join(self.problems))
        kinds = ", ".join(f"{what} {count}" for what, count in sorted(counts.items()))
        print(f"{killed} kills ({kinds}); never more than {self.worst} steps to do again")
        print(f"{len(self.problems)} problems")
        return 1 if self.problems or killed < self.moments else 0

    def start(self, name: str) -> subprocess.Popen[bytes]:
        settings = [
            f"run.name={name}",
            f"training.max_steps={STEPS_A_MOMENT * self.moments + 50}",
            "training.max_epochs=100000",
            f"training.evaluate_every_steps={EVALUATE_EVERY}",
            f"checkpoint.every_steps={SAVE_EVERY}",
            "logging.every_steps=1",
        ]
        if name == "killed":
            settings += ["data.stage=node-local", f"data.stage_directory={self.disk}"]
        command = ("mpirun", "-np", str(self.ranks), sys.executable, "-m", "hpctrain", "run.toml")
        return subprocess.Popen(
            [*command, *settings],
            cwd=self.site,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def one_moment(self) -> str:
        """Start the job, kill it at a moment, check what is left; return what was hit, where."""
        first, starts = self.saved(), len(self.starts())
        job = self.start("killed")
        where, reached = self.draw.choice(self.moments_of(first))
        while not reached():
            if job.poll() is not None:
                return "complete"
            time.sleep(0.0005)
        time.sleep(self.draw.random() * 0.01)
        victims = {
            "rank": self.rank_of(job, self.draw.randrange(self.ranks)),
            "mpirun": job.pid,
        }
        victim = self.draw.choice(["rank", "mpirun", "all"])
        processes = [job.pid, *(child.pid for child in family(job.pid))]
        for process in processes if victim == "all" else [victims[victim] or job.pid]:
            kill(process)
        job.wait()
        self.end(processes, f"{victim} {where}")
        self.check(first, starts)
        return f"{victim} {where}"

    def moments_of(self, first: int) -> list[tuple[str, Callable[[], bool]]]:
        """Return kinds of moments, and how each is known to have come."""
        begin, target = time.monotonic(), first + self.draw.randrange(1, STEPS_A_MOMENT - 10)
        checkpoints, wanted = self.folder / "checkpoints", self.draw.randrange(1, 4)
        delay = self.draw.random() * 4
        seen: set[str] = set()

        def writing(pattern: str, folder: Path) -> bool:
            seen.update(path.name for path in folder.glob(pattern))
            return len(seen) >= wanted

        def evaluating() -> bool:
            step = self.last_step()
            return step > first + 1 and step % EVALUATE_EVERY == 0

        return [
            ("at a step", lambda: self.last_step() >= target),
            ("in a save", lambda: writing(".step-*.tmp", checkpoints)),
            ("at a rename", lambda: self.saved() > first),
            ("in an evaluation", evaluating),
            ("in start-up", lambda: time.monotonic() - begin > delay),
        ]

    def rank_of(self, job: subprocess.Popen[bytes], rank: int) -> int | None:
        for child in family(job.pid):
            try:
                if child.environ().get("PMI_RANK") == str(rank):
                    return child.pid
            except psutil.Error:
                continue
        return None

    def end(self, processes: list[int], what: str) -> None:
        """Wait until the whole job has ended, as it has to by itself."""
        deadline = time.monotonic() + 20
        while any(map(running, processes)):
            if time.monotonic() > deadline:
                self.problems.append(f"{what}: processes lived on")
                for process in filter(running, processes):
                    kill(process)
            time.sleep(0.02)

    def check(self, first: int, starts: int) -> None:
        """Compare what is saved with how far the run had come."""
        step, saved = self.last_step(), self.saved()
        asked_for = step // SAVE_EVERY * SAVE_EVERY
        if saved < max(first, asked_for - SAVE_EVERY):
            self.problems.append(f"step {step}, and only step {saved} is saved")
        self.worst = max(self.worst, step - saved)
        # A job that was killed in start-up said nothing.
        for begin in self.starts()[starts:]:
            if begin != first:
                self.problems.append(f"went on from step {begin}, and step {first} was saved")

    def starts(self) -> list[int]:
        """Return the step at which each job of the run began, as the log tells."""
        try:
            text = (self.folder / "log.txt").read_text(encoding="utf-8")
        except FileNotFoundError:
            return []
        found = re.findall(r"resumes from step ([\d,]+)|(?<= )from scratch", text)
        return [int(step.replace(",", "") or 0) for step in found]

    def saved(self) -> int:
        """Return the step of the newest whole checkpoint, 0 if there is none."""
        for path in newest_first(self.folder / "checkpoints"):
            if is_whole(path):
                return step_of(path.name) or 0
        return 0

    def last_step(self) -> int:
        """Return the newest step in the metrics."""
        try:
            with (self.folder / "metrics.jsonl").open("rb") as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - 4096))
                steps = re.findall(rb'"train", "step": (\d+),', file.read())
        except FileNotFoundError:
            return 0
        return int(steps[-1]) if steps else 0

    def compare(self) -> None:
        """Compare the run with the one that nobody disturbed."""
        runs = [self.site / "runs" / name for name in ("whole", "killed")]
        metrics = []
        for run in runs:
            lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
            records = map(json.loads, lines)
            metrics.append([{k: v for k, v in r.items() if k not in CLOCKED} for r in records])
        if metrics[0] != metrics[1]:
            self.problems.append("the metrics differ from those of an uninterrupted run")
        last = f"checkpoints/step-{STEPS_A_MOMENT * self.moments + 50:08d}/model.safetensors"
        if (runs[0] / last).read_bytes() != (runs[1] / last).read_bytes():
            self.problems.append("the model differs from that of an uninterrupted run")
        if list(self.disk.iterdir()):
            self.problems.append("copies of the data were left behind")


def family(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.Error:
        return []


def running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
