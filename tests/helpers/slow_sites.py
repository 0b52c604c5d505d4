"""Sites of jobs that are as slow as a test wants them at any time."""

from __future__ import annotations

from pathlib import Path

from helpers.launching import ROOT

# As slow, in seconds, as a file says: what is compared with is the same task without it.
TASK = """
import time
from pathlib import Path

from hpctrain.training.task import Classification


def wait(name):
    path = Path(name)
    if path.exists():
        time.sleep(float(path.read_text() or 0))


class Slow(Classification):
    def evaluate(self, model, fields):
        Path("evaluating").touch()
        wait("slow-evaluation")
        return super().evaluate(model, fields)

    def loss(self, model, fields):
        wait("slow-step")
        return super().loss(model, fields)
"""


def make_slow_site(folder: Path, digits: Path, task: str = TASK) -> Path:
    """Make a directory to start jobs in: a record of every step, and `tasks:Slow`."""
    (folder / "data").mkdir()
    (folder / "data" / "digits").symlink_to(digits)
    (folder / "tasks.py").write_text(task, encoding="utf-8")
    config = (ROOT / "configs" / "run.toml").read_text(encoding="utf-8")
    config = config.replace('use = "classification" ', 'use = "tasks:Slow" ')
    config = config.replace("every_steps = 10 ", "every_steps = 1 ")
    (folder / "run.toml").write_text(config, encoding="utf-8")
    return folder
