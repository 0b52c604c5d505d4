"""The page in a real browser: live, as a file, and whatever stands in the files of a run."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from helpers.browser import LIMIT_SECONDS, browser, needs_browser
from helpers.made_runs import append, append_machines, made_run, record

from hpctrain.watch import page
from hpctrain.watch.report import write_report
from hpctrain.watch.run_files import RunFiles

pytestmark = needs_browser

INK = """
return [...document.querySelectorAll('canvas')].filter((canvas) => {
  const {data} = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
  return data.some((value) => value > 0);
}).length;
"""
"""How many canvases have something drawn on them."""


@pytest.fixture(scope="module")
def window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with browser(tmp_path_factory.mktemp("profile")) as driver:
        yield driver


def wait_for(driver: Any, script: str) -> Any:
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(driver, LIMIT_SECONDS).until(lambda _: driver.execute_script(script))


def forget_log(driver: Any) -> None:
    driver.get_log("browser")
    driver.get_log("performance")


def complaints(driver: Any) -> list[str]:
    """What the console has said."""
    return [entry["message"] for entry in driver.get_log("browser")]


def asked(driver: Any) -> set[str]:
    """Hosts that were asked for something."""
    found = set()
    for entry in driver.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            url = urlsplit(message["params"]["request"]["url"])
            if url.scheme not in ("data", "file", "chrome", "about"):
                found.add(url.netloc)
    return found


def opened(folder: Path) -> RunFiles:
    return RunFiles(folder, lambda _: True)


@contextmanager
def watching(run: Path) -> Iterator[str]:
    """The command, and the address that it tells to open."""
    command = [sys.executable, "-m", "hpctrain", "watch", str(run), "--serve"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline().startswith("from another machine: ssh -N -L ")
            yield process.stdout.readline().removeprefix("open ").strip()
        finally:
            process.terminate()


def test_the_served_page_grows(window: Any, tmp_path: Path) -> None:
    run = made_run(tmp_path / "run\x1b[31m")
    with watching(run) as address:
        forget_log(window)
        window.get(address)
        wait_for(window, "return document.querySelectorAll('canvas').length >= 3")
        assert window.execute_script(INK) >= 3
        assert "token" not in window.current_url
        # Text from files is text.
        assert "owned" not in window.title
        assert r"run\x1b[31m" in window.find_element("css selector", "#states h3").text
        log = window.find_element("id", "lines").text
        assert "</script><script>document.title='owned'</script>" in log
        assert r"nid\x1b[31m001" in log
        # What jobs append comes by itself.
        append(run, record(210, loss=77.125), record(220, novel_metric=1.5))
        with (run / "log.txt").open("a") as file:
            file.write("a line of later\n")
        wait_for(window, "return document.body.innerText.includes('novel_metric')")
        wait_for(window, "return document.getElementById('lines').innerText.includes('of later')")
        assert 77.125 in window.execute_script("return plots.get('metric loss').plot.data[1]")
        append_machines(run, 1, 3)
        wait_for(window, "return document.querySelectorAll('canvas.heat').length === 1")
        # Metrics that a resume has cut back do not stay.
        lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
        (run / "new").write_bytes(b"".join(lines[:5]) + json.dumps(record(60)).encode() + b"\n")
        (run / "new").replace(run / "metrics.jsonl")
        wait_for(window, "return Math.max(...plots.get('metric loss').plot.data[0]) === 60")
        assert asked(window) == {urlsplit(address).netloc}
        assert complaints(window) == []
    wait_for(window, "return !document.getElementById('gone').hidden")
    assert "does not answer" in window.find_element("id", "gone").text


def test_a_report_of_many_points_from_a_file(window: Any, tmp_path: Path) -> None:
    one, two = made_run(tmp_path / "one"), made_run(tmp_path / "two", reason="crash: <b>rank 3</b>")
    append(one, *(record(step, note="</script>") for step in range(210, 1_000_001, 10)))
    target = tmp_path / "report.html"
    assert write_report([opened(one), opened(two)], target) < 2_000_000
    forget_log(window)
    window.get(target.as_uri())
    wait_for(window, "return document.querySelectorAll('canvas').length >= 3")
    assert window.execute_script(INK) >= 3
    assert window.execute_script("return plots.get('metric loss').plot.data[0].length") > 2000
    assert "crash: <b>rank 3</b>" in window.find_element("id", "jobs").text
    # The other units of the same steps; a page of two runs marks where their configs differ.
    for unit, last in (("samples", 64_000_000), ("epoch", 2000), ("time", 1_764_606_000)):
        window.execute_script(
            "const e = document.getElementById('axis'); e.value = arguments[0];"
            "e.dispatchEvent(new Event('change'));",
            unit,
        )
        xs = window.execute_script("return plots.get('metric loss').plot.data[0]")
        assert xs == sorted(set(xs))
        assert xs[-1] == pytest.approx(last, rel=0.01)
    columns = "getComputedStyle(document.getElementById('charts')).gridTemplateColumns.split(' ')"
    for width, count in ((1400, 3), (400, 1)):
        window.set_window_size(max(width, 500), 1000)
        window.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": 1000, "deviceScaleFactor": 1, "mobile": False},
        )
        wait_for(
            window,
            "return document.documentElement.scrollWidth <= innerWidth "
            f"&& {columns}.length === {count}",
        )
    # Where nobody points, legends tell the last; of phases that are stacked each its own part.
    legends = "return [...document.querySelectorAll('.u-legend')].map((e) => e.innerText)"
    told = [re.sub(r"\s+", " ", each) for each in window.execute_script(legends)]
    assert re.match(r"time20\d\d-\d\d-\d\d \d\d:\d\done train0two train1\.883$", told[0])
    assert told[-1].endswith("compute95.24 %data4.762 %")
    # By the keyboard.
    before = window.execute_script("return plots.get('metric loss').plot.scales.x.max")
    window.execute_script(
        "plots.get('metric loss').frame.dispatchEvent(new KeyboardEvent('keydown', {key: '+'}))"
    )
    wait_for(window, f"return plots.get('metric loss').plot.scales.x.max < {before}")
    assert asked(window) == set()
    assert complaints(window) == []


def test_machines_of_64_nodes(window: Any, tmp_path: Path) -> None:
    run = made_run(tmp_path / "run")
    append_machines(run, 64, 600)
    target = tmp_path / "report.html"
    assert write_report([opened(run)], target) < 2_000_000
    forget_log(window)
    window.get(target.as_uri())
    wait_for(window, "return !document.getElementById('machines-section').hidden")
    told = window.find_element("id", "machines").text
    for title in ("device busy", "device power", "CPU busy", "network", "own time of a step"):
        assert title in told
    _, means, lows, highs = window.execute_script("return plots.get('machine CPU busy').plot.data")
    assert (lows[0], highs[0]) == (0, pytest.approx(100 * 63 / 64, rel=1e-3))
    assert means[0] == pytest.approx(100 * 31.5 / 64, rel=1e-3)
    heat = window.find_element("css selector", "canvas.heat")
    filled = """
      const {data} = arguments[0].getContext('2d').getImageData(0, 0, arguments[0].width, 256);
      return data.filter((value, i) => i % 4 === 3 && value === 255).length;
    """
    assert window.execute_script(filled, heat) == 256 * int(heat.get_attribute("width"))
    assert int(heat.get_attribute("width")) > 20
    window.execute_script(
        "arguments[0].dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowDown'}))", heat
    )
    read = window.find_element("css selector", "#ranks [role=status]").text
    assert re.fullmatch(r"rank 1 on nid000, 20\d\d-\d\d-\d\d \d\d:\d\d: 0.2 s", read)
    assert heat.get_attribute("height") == "256"
    assert "from 0.2 to 0.5" in heat.get_attribute("aria-label")
    slow = window.find_element("css selector", "#ranks .bad").text
    assert slow.startswith(r"rank 255 on nid\x1b063, device 3: 0.5 s of a step, the others 0.2 s")
    assert slow.endswith("<i>hot</i>")
    assert complaints(window) == []


def test_colours_follow_the_systems(window: Any, tmp_path: Path) -> None:
    target = tmp_path / "report.html"
    write_report([opened(made_run(tmp_path / "run"))], target)
    for scheme, other in (("dark", "light"), ("light", "dark")):
        feature = {"name": "prefers-color-scheme", "value": scheme}
        window.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
        window.get(target.as_uri())
        assert window.execute_script("return document.documentElement.dataset.theme") == scheme
        window.execute_script("document.getElementById('theme').click()")
        assert window.execute_script("return document.documentElement.dataset.theme") == other
    window.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_what_others_have_written_is_as_they_published_it() -> None:
    for name in page.CHECKSUMS:
        assert page.asset(name)
    assert "MIT" in (Path(page.__file__).parent / "page" / "uPlot.LICENSE").read_text()
    own = "".join(page.asset(name) for name in page.SCRIPTS if name not in page.CHECKSUMS)
    assert not re.search(r"innerHTML|insertAdjacentHTML|document\.write|eval\(", own)
