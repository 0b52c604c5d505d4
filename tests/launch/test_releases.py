"""A later release goes on with the runs of an older one as that one would have, or says why not."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.launching import BODIES
from helpers.limits import LONG_JOB_SECONDS
from helpers.resuming import ONE_THREAD

pytestmark = pytest.mark.ranks(2)

DATA = Path(__file__).parents[1] / "data"
RELEASES = sorted(path.name for path in DATA.iterdir() if (path / "data").is_dir())

REFUSED = {
    ("0.1.0", "groups"): (78, r"optimizer\.use: .* did not save all that Adapting has learned"),
    ("0.1.0", "packed-decoded"): (78, r'^data\.decode = "cf", but the run .* began with "none"'),
    ("0.1.0", "complex"): (
        78,
        'training.precision = "32-true": .* made rotation of the model real',
    ),
}
"""What no later release can go on with, and why."""


STOPPED = 7
"""Steps of the jobs that the older release has left."""


def records(text: str) -> list[dict[str, Any]]:
    """Return metrics without what depends on the machine."""
    found = [json.loads(line) for line in text.splitlines()]
    clocked = ("seconds", "samples_per_second", "wall_time")
    return [{key: value for key, value in record.items() if key not in clocked} for record in found]


@pytest.fixture(scope="module", params=RELEASES)
def release(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, dict[str, dict[str, Any]]]:
    """A release, its runs after another job of this one, and how each of these jobs ended."""
    folder = tmp_path_factory.mktemp("release") / "site"
    shutil.copytree(DATA / request.param, folder)
    shutil.copy(DATA / "release_parts.py", folder)
    catalogue = json.loads((folder / "data" / "steps.json").read_bytes())
    for file in catalogue["files"]:  # git keeps no times
        os.utime(folder / "data" / file["file"], ns=(file["modified_ns"],) * 2)
    # A run that began without decoding, and is asked for it now.
    shutil.copytree(folder / "packed", folder / "packed-decoded")
    asked = (folder / "packed.toml").read_text(encoding="utf-8")
    asked = asked.replace('"packed"', '"packed-decoded"').replace("[data]", '[data]\ndecode = "cf"')
    (folder / "packed-decoded.toml").write_text(asked, encoding="utf-8")
    cases = sorted(path.stem for path in folder.glob("*.toml"))
    result = subprocess.run(
        [
            *("mpirun", "-np", "2", sys.executable, str(BODIES / "releases.py"), str(folder)),
            *cases,
        ],
        capture_output=True,
        text=True,
        timeout=LONG_JOB_SECONDS,
        check=False,
        env=os.environ | ONE_THREAD,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    lines = [line for line in result.stdout.splitlines() if line.startswith("case ")]
    ended = {found["case"]: found for found in (json.loads(line[5:]) for line in lines)}
    assert sorted(ended) == cases, result.stdout + result.stderr
    return request.param, folder, ended


def test_a_run_of_an_older_release_goes_on_as_it_would_have_there(
    release: tuple[str, Path, dict[str, dict[str, Any]]],
) -> None:
    """Losses, gradients, learning rates and evaluations of every step, those before included."""
    version, folder, ended = release
    went_on = [case for case in ended if (version, case) not in REFUSED]
    assert len(went_on) > 5
    for case in went_on:
        assert ended[case]["code"] == 0, ended[case]
        expected = records((folder / f"{case}.jsonl").read_text(encoding="utf-8"))
        found = records((folder / case / "metrics.jsonl").read_text(encoding="utf-8"))
        # The job that ended in an epoch's middle evaluated there, as every job does at its end.
        own = {"kind": "evaluation", "step": STOPPED}
        found = [record for record in found if record != {**record, **own}]
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            # Other processors round otherwise; another meaning of the config changes digits.
            for key, value in other.items():
                near = value if isinstance(value, str) else pytest.approx(value, rel=1e-5)
                assert one[key] == near, (case, key, one, other)


def test_each_job_leaves_its_record(
    release: tuple[str, Path, dict[str, dict[str, Any]]],
) -> None:
    """Of the jobs above, those that were refused included; there was none in the older release."""
    _, folder, ended = release
    for case, found in ended.items():
        record = json.loads((folder / case / "jobs" / "1.json").read_bytes())
        assert record["exit_code"] == found["code"]
        assert record["start"] < record["end"]
        assert record["versions"]["MPI"]
        assert record["packages"]["numpy"]
        assert sum(node["ranks"] for node in record["nodes"]) == 2
        if found["code"] == 0:
            assert record["steps"] == {"first": STOPPED, "last": 14}
            assert record["modules"]["release_parts"]["file"] == "release_parts.py"
            meta = json.loads(next((folder / case).glob("*/*-00000014/meta.json")).read_bytes())
            assert meta["made_by"]["job"] == 1
            assert meta["made_by"]["modules"] == record["modules"]


def test_what_cannot_go_on_is_refused_with_its_reason(
    release: tuple[str, Path, dict[str, dict[str, Any]]],
) -> None:
    version, folder, ended = release
    for (of, case), (code, words) in REFUSED.items():
        if of != version:
            continue
        assert ended[case]["code"] == code, ended[case]
        assert re.search(words, ended[case]["error"])
        # Nothing of it is touched.
        before, after = (
            {path.name: path.read_bytes() for path in sorted(each.rglob("step-*/*"))}
            for each in (DATA / version / case.partition("-")[0], folder / case)
        )
        assert before
        assert before == after
