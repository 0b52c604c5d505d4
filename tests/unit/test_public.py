"""The public surface: these names, each found, none of them paid for before it is asked for."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.limits import JOB_SECONDS

import hpctrain
import hpctrain.data
import hpctrain.lightning

NAMES = {
    "Classification",
    "LanguageModeling",
    "Regression",
    "Task",
    "World",
    "__version__",
    "connect",
    "launch",
    "load_config",
    "load_model",
    "train",
}
OF_LIGHTNING = {"Trainer"}
OF_DATA = {"Ragged", "Storage", "Writer", "open_dataset"}

WITHOUT_ANYTHING_HEAVY = """
import sys
import hpctrain, hpctrain.data
hpctrain.load_config
heavy = {"torch", "numpy", "h5py", "mpi4py", "pydantic"} & set(sys.modules)
assert not heavy, heavy
"""


def test_names() -> None:
    assert set(hpctrain.__all__) == NAMES
    assert set(hpctrain.data.__all__) >= OF_DATA
    assert set(hpctrain.lightning.__all__) == OF_LIGHTNING
    for module in (hpctrain, hpctrain.data, hpctrain.lightning):
        for name in module.__all__:
            assert getattr(module, name) is not None
    assert hpctrain.Classification.__name__ == "Classification"
    with pytest.raises(AttributeError, match="no attribute 'absent'"):
        hpctrain.absent  # noqa: B018 - what asking for it does


def test_what_checkers_are_told_is_what_is_there() -> None:
    """Names are imported by strings, and their types are declared beside these."""
    source = Path(hpctrain.__file__).read_text(encoding="utf-8")
    declared = {
        alias.asname or alias.name: (node.module, alias.name)
        for block in ast.parse(source).body
        if isinstance(block, ast.If)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    homes = {name: tuple(home.split(":")) for name, home in hpctrain._HOMES.items()}
    assert declared == homes


def test_nothing_heavy_is_imported_before_it_is_asked_for() -> None:
    command = [sys.executable, "-c", WITHOUT_ANYTHING_HEAVY]
    subprocess.run(command, check=True, timeout=JOB_SECONDS)
