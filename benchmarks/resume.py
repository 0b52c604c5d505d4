"""Every case of a run that is stopped or fails, and goes on: is it what nobody disturbed?

    python benchmarks/resume.py                     the full grid
    python benchmarks/resume.py --precision 64-true --ranks 3

Precision, strategy, where it stopped (inside an epoch, in an evaluation, between an evaluation and
its save, in a save) and the number of ranks, all with all, and each of these with every scheduler,
every model (statistics of its own, buffers that are assigned anew, complex parameters) and every
optimizer (slots of parameters, values of its groups, lists, a second set of weights) and all data
(files, a torch Dataset that draws from every generator, one drawn by weights). Compared bit for
bit: every record of the metrics, every parameter, all that the optimizer knows, and every random
generator of the last checkpoint. The tests take some of all combinations, in which every two values
meet.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "tests"))

from helpers.resuming import AXES, grid, run_cases


def main() -> int:
    parser = argparse.ArgumentParser()
    for axis, values in AXES.items():
        parser.add_argument(f"--{axis}", choices=values)
    asked = {axis: value for axis, value in vars(parser.parse_args()).items() if value}
    cases = [case for case in grid() if asked.items() <= case.items()]
    begin, differing, counts = time.monotonic(), 0, Counter[str]()

    def group(case: dict[str, str]) -> tuple[str, str]:
        return case["ranks"], case["precision"]

    for (ranks, precision), some in itertools.groupby(sorted(cases, key=group), key=group):
        with tempfile.TemporaryDirectory() as folder:
            for case in run_cases(Path(folder), ranks, list(some), timeout=600):
                counts.update(f"{axis} {case[axis]}" for axis in AXES if axis in case)
                counts[f"ranks {ranks}"] += 1
                if case["difference"] is not None:
                    differing += 1
                    print("differs:", ranks, case)
        seconds = time.monotonic() - begin
        print(f"{ranks} ranks, {precision}: {counts.total() // len(AXES)} cases, {seconds:.0f} s")
    for name, count in sorted(counts.items()):
        print(f"  {name:<30}{count:>5}")
    print(f"{len(cases)} cases, {len(cases) - differing} equal bit for bit, {differing} not")
    return int(differing > 0)


if __name__ == "__main__":
    sys.exit(main())
