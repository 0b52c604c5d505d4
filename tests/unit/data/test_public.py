"""The public names of `hpctrain.data`: those that docs promise, those of before, and no others."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import hpctrain.data

ROOT = Path(__file__).parents[3]


def test_the_public_names() -> None:
    assert hpctrain.data.__all__ == ["Ragged", "Storage", "Writer", "open_dataset", "random"]
    for name in hpctrain.data.__all__:
        assert getattr(hpctrain.data, name).__name__.rpartition(".")[2] == name
    with pytest.raises(AttributeError, match="has no attribute 'anything'"):
        _ = hpctrain.data.anything


@pytest.mark.parametrize("name", ["Dataset", "Field", "Order", "default_lanes"])
def test_names_that_were_public_are_taken_with_a_warning(name: str) -> None:
    with pytest.warns(DeprecationWarning, match=rf"hpctrain\.data\.{name} will not be public"):
        assert getattr(hpctrain.data, name).__name__ == name


def test_transforms_may_draw_by_the_old_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "hpctrain.data.draws", raising=False)
    with pytest.warns(DeprecationWarning, match="write `from hpctrain.data import random`"):
        draws = importlib.import_module("hpctrain.data.draws")
    for name in draws.__all__:
        assert getattr(draws, name) is getattr(hpctrain.data.random, name)


def test_tools_start_without_torch() -> None:
    code = (
        "import sys, hpctrain.data;"
        "assert not {'torch', 'numpy', 'h5py'} & set(sys.modules);"
        "from hpctrain.data import Storage, Writer, open_dataset;"
        "import hpctrain.convert.digits, hpctrain.data.loading.sources, hpctrain.convert.options;"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
