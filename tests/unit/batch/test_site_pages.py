"""docs/sites/: every command of hpctrain on these pages is one that it takes, in their order."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from hpctrain.batch.exit_status import Outcome, write_outcome
from hpctrain.cli import main
from hpctrain.cli.usage import USAGES

ROOT = Path(__file__).parents[3]
PAGES = sorted((ROOT / "docs" / "sites").glob("*.md"))
SUBMITS = {"sbatch": "echo 41", "bsub": "echo 'Job <41> is submitted.'", "qsub": "echo '41[].s'"}
SUBMITS["flux"] = "[[ $1 != batch ]] || echo f41"


def commands(page: Path) -> list[str]:
    text = page.read_text(encoding="utf-8")
    return re.findall(r"^    (?:\S+=\S+ )*(\S.*)$", text, re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_commands_of_a_page(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that train, or need a scheduler's own command, are tried by tests under Slurm."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
    for name, says in SUBMITS.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{says}\n", encoding="utf-8")
        (tmp_path / "bin" / name).chmod(0o755)
    tried = []
    for line in commands(page):
        words = shlex.split(line.partition(" >")[0].partition(" #")[0])
        if words[:1] == ["cd"]:
            monkeypatch.chdir(words[1])
        if words[:3] != ["python", "-m", "hpctrain"]:
            continue
        command = words[3]
        if command == "data":
            for part in ("train", "validation"):
                Path("data", "digits", part).mkdir(parents=True)
        elif command == "bundle":
            for name in words[5:]:
                Path(name).touch()
        if command in ("status", "bundle"):
            Path("runs", "first").mkdir(parents=True, exist_ok=True)
            write_outcome(Path("runs/first"), Outcome(code=0, reason="", step=1, tries=1))
        if command in ("init", "config", "job", "status", "runs", "bundle"):
            assert main(words[3:]) == 0, line
            tried.append(command)
        else:
            assert command in (*USAGES, "run.toml", "--version"), line
    assert tried == ["init", "config", "job", "status", "job", "runs", "bundle"]


def test_there_is_a_page_for_each_family() -> None:
    index = (ROOT / "docs" / "sites.md").read_text(encoding="utf-8")
    assert [page.stem for page in PAGES] == [
        *("flux", "lsf", "pbs-pals", "slurm-cray", "slurm-nvidia")
    ]
    for page in PAGES:
        assert f"docs/sites/{page.name}" in index
        text = page.read_text(encoding="utf-8")
        for title in ("Interactive, for debugging", "A sweep", "What to send to your support desk"):
            assert f"## {title}" in text
