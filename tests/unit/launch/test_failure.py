"""What is printed of a rank that fails, and what is known of the reason."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from hpctrain.launch.failure import _shadows


def test_files_of_ours_in_place_of_modules_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A torch.py that fails, and a module of the standard library that lacks what others use."""
    for name in ("torch", "profile", "mine"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('mine')", encoding="utf-8")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    torch = tmp_path / "torch.py"
    with pytest.raises(RuntimeError) as caught:
        exec(compile(torch.read_text(encoding="utf-8"), str(torch), "exec"))
    assert _shadows(caught.value) == (
        f"hpctrain: {torch} was imported in place of the module of that name: rename it, or start "
        "from another folder\n"
    )
    loaded = type(sys)("profile")
    loaded.__file__ = str(tmp_path / "profile.py")
    assert _shadows(AttributeError("no attribute 'run'")) == ""  # it lies there, unused
    monkeypatch.setitem(sys.modules, "profile", loaded)
    assert "profile.py was imported in place" in _shadows(AttributeError("no attribute 'run'"))
