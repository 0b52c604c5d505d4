"""What looking at runs costs: tables of a thousand, a long run's page, and figures in the step.

    python benchmarks/watch.py               all of it; the page's part needs node
    mpirun -np 2 python benchmarks/watch.py --figures

Seconds of CPU time, the least of several tries. What figures of machines cost a step is told by
paired blocks with `logging.machine` and without, beside the share of the thread that samples.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from helpers.made_runs import append, append_machines, made_run, record

from hpctrain.cli import main as command
from hpctrain.watch.report import write_report
from hpctrain.watch.run_files import RunFiles

RUNS, STEPS = 1000, 100_000

PARSE = """
const fs = require("fs");
const source = fs.readFileSync(process.argv[1], "utf8");
const Curves = new Function(source + "; return Curves;")();
const lines = fs.readFileSync(process.argv[2], "utf8").split("\\n").filter((line) => line);
let least = Infinity;
for (let i = 0; i < 5; i++) {
  const begin = process.cpuUsage().user, curves = new Curves();
  for (const line of lines) curves.add(JSON.parse(line));
  least = Math.min(least, (process.cpuUsage().user - begin) / 1e6);
}
console.log(least);
"""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--figures", action="store_true", help="only what figures cost a step")
    parser.add_argument("--rounds", type=int, default=60)
    asked = parser.parse_args()
    if not asked.figures:
        with tempfile.TemporaryDirectory() as folder:
            tell_files(Path(folder))
    tell_figures(asked.rounds)


def tell_files(folder: Path) -> None:
    for number in range(RUNS):
        made_run(folder / "runs" / f"run-{number:04}")
    print(f"`runs` over {RUNS:,} folders: {least(lambda: listed(folder / 'runs')):.2f} s of CPU")
    long = made_run(folder / "long")
    append(long, *(record(step) for step in range(210, 10 * STEPS, 10)))
    append_machines(long, 64, 120)
    target = folder / "report.html"
    seconds = least(lambda: write_report([RunFiles(long, lambda _: False)], target))
    size = target.stat().st_size / 1e6
    print(f"report of {STEPS:,} lines and 64 nodes: {seconds:.2f} s of CPU, {size:.2f} MB")
    if (node := shutil.which("node")) is None:
        print("the page: node is not installed")
        return
    script = Path(__file__).parents[1] / "hpctrain" / "watch" / "page" / "model.js"
    parse = [node, "-e", PARSE, str(script), str(long / "metrics.jsonl")]
    told = subprocess.run(parse, capture_output=True, text=True, check=True).stdout
    print(f"the page takes {STEPS:,} lines of metrics in: {float(told):.2f} s of CPU")


def listed(folder: Path) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        command(["runs", str(folder)])


def tell_figures(rounds: int) -> None:
    import torch
    from step import CONFIG, SAMPLES, Job, measure, ratio_of, tenth

    import hpctrain

    with hpctrain.connect() as world, tempfile.TemporaryDirectory() as folder:
        fields = {"x": torch.randn(SAMPLES, 64), "y": torch.randint(10, (SAMPLES,))}
        jobs = {
            name: Job(world, fields, Path(folder, name), f"{CONFIG}machine = {name}\n")
            for name in ("false", "true")
        }
        torch.set_num_threads(1)
        table = measure({**jobs}, rounds)
        for job in jobs.values():
            job.stop.flush()
        if not world.topology.is_rank_zero:
            return
        without, figures = table["false"], table["true"]
        by_clock, by_cpu = (
            ratio_of(mine, theirs) for mine, theirs in zip(figures, without, strict=True)
        )
        print(
            f"a step with figures / without: {by_clock:.3f}, of CPU time {by_cpu:.3f} (below 1.01)"
        )
        print(f"  CPU p10 {tenth(figures[1]):.1f} us with, {tenth(without[1]):.1f} us without")
        print(f"the thread that samples: {100 * sampling(world.device.type) / 5:.3f} % of a core")


def sampling(kind: str) -> float:
    """Return seconds of CPU time of a sample."""
    from hpctrain.observe.machine.counters import read_counters
    from hpctrain.observe.machine.devices import find_devices

    devices = find_devices(kind, Path("/"))

    def sample() -> None:
        read_counters(Path("/"))
        devices.read()

    return least(sample, 20)


def least(act: Callable[[], object], tries: int = 3) -> float:
    """Return the least CPU time of several tries, in seconds."""
    times = []
    for _ in range(tries):
        begin = time.process_time()
        act()
        times.append(time.process_time() - begin)
    return min(times)


if __name__ == "__main__":
    main()
