"""What a run leaves in its folder, as tests read it: also while a job is writing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

# Metrics compare to the bit, except for what a clock says.
CLOCKED = frozenset({"seconds", "samples_per_second", "wall_time"})


def metrics(run: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """Return the records, or those of one kind, without what a clock says."""
    path = run / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    # The last line may be half there.
    records = map(json.loads, (line for line in lines if line.endswith("}")))
    return [
        {key: value for key, value in record.items() if key not in CLOCKED}
        for record in records
        if kind in (None, record["kind"])
    ]


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in metrics(run, "train")]


def last_step(run: Path) -> int:
    """Return the last step that the metrics tell of, 0 before the first."""
    return max((record["step"] for record in metrics(run, "train")), default=0)


def outcome(run: Path) -> dict[str, Any]:
    """Return what exit.json says, nothing where there is none."""
    path = run / "exit.json"
    return json.loads(path.read_bytes()) if path.exists() else {}
