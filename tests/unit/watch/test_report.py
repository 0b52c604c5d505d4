"""Reports: thinned curves keep extremes, gaps, ends and sums of phases; plots as images."""

from __future__ import annotations

import itertools
import json
import math
import random
import sys
from pathlib import Path

import PIL.Image
import pytest
from helpers.made_runs import BEGIN, append, append_machines, made_run, record

from hpctrain.cli import main
from hpctrain.errors import ExitCode
from hpctrain.watch.report import MOST_SERIES, curves, gathered, thinned, write_report
from hpctrain.watch.run_files import RunFiles


@pytest.mark.parametrize("count", [1, 4, 50, 100, 101, 100_000])
def test_extremes_and_ends_stay(count: int) -> None:
    draw = random.Random(count)
    values: list[float | None] = [draw.gauss(0, 1) for _ in range(count)]
    values[count // 3] = 1e6
    values[count // 2] = -1e6
    values[count * 3 // 4] = None
    kept = thinned(values, 100)
    assert len(kept) <= max(100, min(count, 100))
    assert kept == sorted(set(kept))
    assert {0, count // 2, count * 3 // 4, count - 1} <= set(kept)
    known = [value for value in values if value is not None]
    shown = [value for i in kept if (value := values[i]) is not None]
    assert max(known, default=0) == max(shown, default=0)


def test_what_is_short_stays_as_it_is() -> None:
    made = curves(
        [
            record(10),
            record(20, loss=None),
            {"kind": "evaluation", "split": "v", "step": 20, "f1": 1},
        ]
    )
    series = {(each["split"], each["key"]): each for each in made["series"]}
    assert series["train", "loss"]["step"] == [10, 20]
    assert series["train", "loss"]["value"][1] is None
    assert series["v", "f1"]["value"] == [1]
    assert made["axis"]["step"] == [10, 20]
    assert made["axis"]["samples"] == [640, 1280]


def test_numbers_of_a_long_run() -> None:
    records = [record(step, loss=1.0) for step in range(10, 200_001, 10)]
    records[777]["loss"] = 99.0
    records[778]["nonfinite"] = {"loss": "nan"}
    records[778]["loss"] = None
    made = curves(records, most=3000)
    series = {each["key"]: each for each in made["series"]}
    assert max(filter(None, series["loss"]["value"])) == 99.0
    assert None in series["loss"]["value"]
    assert "nonfinite.loss" not in series
    assert sum(series["seconds.data"]["value"]) == pytest.approx(0.1 * len(records))
    assert series["seconds.data"]["step"] == series["seconds.compute"]["step"]
    assert sum(len(each["step"]) for each in made["series"]) < 4000
    assert all(len(column) == len(made["axis"]["step"]) for column in made["axis"].values())
    assert math.isclose(made["axis"]["time"][-1], records[-1]["wall_time"])


def test_plots_as_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An image a number, of all runs together; the message without matplotlib names the extra."""
    pytest.importorskip("matplotlib")
    one, other = made_run(tmp_path / "one"), made_run(tmp_path / "zwei/\u00e9\x1b[31m")
    append(one, record(210, **{"$x_{": 1.0, "_private": 2.0, "\\\\y": 3.0}))
    output, images = str(tmp_path / "r.html"), tmp_path / "new" / "images"
    command = ["report", str(one), str(other), "--output", output, "--png"]
    assert main([*command, str(images)]) == ExitCode.DONE
    names = sorted(path.name for path in images.iterdir())
    assert f"{images}: {len(names)} images" in capsys.readouterr().out
    assert {"loss.png", "accuracy.png", "lr.png"} <= set(names)
    with PIL.Image.open(images / "loss.png") as image:
        assert image.size == (900, 600)
        assert len(image.convert("RGB").getcolors(1 << 20)) > 10  # curves, not a blank sheet
    assert main([*command, output]) != ExitCode.DONE  # a file is in the way
    assert f"{output} cannot be written" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main([*command, str(images)]) != ExitCode.DONE
    assert "pip install 'hpctrain[plots]'" in capsys.readouterr().err


def test_figures_of_hosts_are_put_together_where_they_do_not_fit(tmp_path: Path) -> None:
    """The same stretches for all, without a gap; the slowest minute of a rank stays."""
    run = made_run(tmp_path / "run")
    append_machines(run, 8, 3000)
    path = run / "machine" / "nid002.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    slow = json.loads(lines[1501])
    slow["ranks"]["step"][1] = 9.0
    path.write_text("".join([*lines[:1501], json.dumps(slow) + "\n", *lines[1502:]]), "utf-8")
    found = gathered([RunFiles(run, lambda _: None)])["runs"][0]["machines"]
    times = {
        tuple(line["wall_time"] for line in lines if line["kind"] == "machine")
        for lines in found.values()
    }
    assert len(found) == 8
    assert len(times) == 1
    moments = times.pop()
    assert len(moments) > 100
    assert len({round(b - a) for a, b in itertools.pairwise(moments)}) == 1
    slowest = [line["ranks"]["step"][1] for line in found["nid002"]]
    assert max(slowest) == pytest.approx(8.7)
    assert sorted(slowest)[-2] == pytest.approx(0.2)
    assert [line["kind"] for line in found["nid007"]].count("straggler") == 1
    assert found["nid001"][0]["network"] == {"all": [150.0]}


@pytest.mark.parametrize("moment", [0, 1e308, -1e308, None, BEGIN])
def test_figures_that_are_not_ours(tmp_path: Path, moment: float | None) -> None:
    values: list[object] = [[], 5, "x", None, {"busy": [1e308, 1e308], "watts": [1e308] * 3}]
    values += [{"used": 1e308, "rank": [[], "x", 1], "step": [1e308, None, True], "others": 3}]
    kinds = ("cpu", "memory", "disk", "network", "devices", "ranks")
    run = made_run(tmp_path / "run")
    (run / "machine").mkdir()
    with (run / "machine" / "h.jsonl").open("w", encoding="utf-8") as file:
        for value in values:
            line = {"kind": "machine", "step": 1, "wall_time": moment}
            file.write(json.dumps(line | dict.fromkeys(kinds, value)) + "\n")
    write_report([RunFiles(run, lambda _: None)], tmp_path / "report.html")
    content = (tmp_path / "report.html").read_bytes().partition(b'id="data">')[2]
    assert b"Infinity" not in content.partition(b"</script>")[0]


def test_a_report_has_a_bound_of_curves_and_says_what_it_left_out() -> None:
    records = [record(step, **{f"k{step}-{i}": 1.0 for i in range(500)}) for step in range(1, 21)]
    made = curves(records)
    assert len(made["series"]) == MOST_SERIES
    assert made["left_out"] + MOST_SERIES == 20 * 500 + 4
    assert made["series"][0]["key"] == "loss"
