"""Environments of ranks under each launcher, as they were recorded."""

from __future__ import annotations

from pathlib import Path

ENVIRONMENTS = Path(__file__).parents[1] / "data" / "environments"


def recorded(name: str) -> dict[str, str]:
    lines = (ENVIRONMENTS / f"{name}.env").read_text(encoding="utf-8").splitlines()
    return dict(line.split("=", maxsplit=1) for line in lines if not line.startswith("#"))
