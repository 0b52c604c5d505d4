"""The command line: what was asked for, who does it, and the exit code."""

from __future__ import annotations

from hpctrain.cli.dispatch import main

__all__ = ["main"]
