"""Folders of runs as jobs leave them, made without one."""

from __future__ import annotations

import json
import math
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

BEGIN = 1_764_396_000.0


def record(step: int, **more: Any) -> dict[str, Any]:
    """A line of metrics.jsonl as training writes it."""
    return {
        "kind": "train",
        "step": step,
        "epoch": step // 500,
        "samples_seen": 64 * step,
        "loss": 2.3 * math.exp(-step / 1000),
        "lr": 1e-3,
        "seconds": {"compute": 2.0, "data": 0.1},
        "wall_time": BEGIN + 2.1 * step / 10,
    } | more


def append(run: Path, *records: dict[str, Any]) -> None:
    """Append lines to a run's metrics."""
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(each) + "\n" for each in records)


def made_run(folder: Path, steps: int = 200, *, reason: str = "running") -> Path:
    """A run of one finished and one last job, with a log that is not what a page expects."""
    (folder / "jobs").mkdir(parents=True)
    append(folder, *(record(step) for step in range(10, steps + 1, 10)))
    append(folder, {"kind": "evaluation", "split": "validation", "step": steps, "accuracy": 0.5})
    outcome = {"code": None, "reason": reason, "step": steps, "tries": 2}
    (folder / "exit.json").write_text(json.dumps(outcome), encoding="utf-8")
    (folder / "config.toml").write_text("[training]\nmax_steps = 1000\n", encoding="utf-8")
    (folder / "log.txt").write_text(
        "</script><script>document.title='owned'</script>\nhost nid\x1b[31m001\n", encoding="utf-8"
    )
    for number, (start, end) in enumerate([(0, 60), (100, None)], 1):
        about = {
            "version": 1,
            "number": number,
            "command": ["python", "-m", "hpctrain", "</script><b>"],
            "world_size": 8,
            "nodes": [{"host": "nid\x1b001"}, {"host": "nid002"}],
            "start": moment(start),
            "end": None if end is None else moment(end),
            "reason": reason if end is None else "stopped: walltime",
            "steps": {"first": 0 if number == 1 else 100, "last": 100 if end else None},
        }
        (folder / "jobs" / f"{number}.json").write_text(json.dumps(about), encoding="utf-8")
    return folder


def append_machines(run: Path, hosts: int, minutes: int, ranks_per_node: int = 4) -> None:
    """Append lines of machine figures of many hosts; the last rank is slow, and named."""
    (run / "machine").mkdir(exist_ok=True)
    last = hosts * ranks_per_node - 1
    for host in range(hosts):
        ranks = [host * ranks_per_node + i for i in range(ranks_per_node)]
        lines: list[dict[str, Any]] = [
            {
                "kind": "machine",
                "step": 10 * (minute + 1),
                "seconds": 60.0,
                "cpu": {"cores": 64, "busy": host / hosts, "job": 12.0},
                "memory": {"total": 512_000, "used": 100_000 + host},
                "network": {"hsn0": [100.0, 50.0]},
                "devices": {"busy": [0.9] * ranks_per_node, "watts": [400.0] * ranks_per_node},
                "ranks": {
                    "count": len(ranks),
                    "rank": ranks,
                    "step": [0.5] * len(ranks),
                    "others": [0.0 if rank == last else 0.3 for rank in ranks],
                },
                "wall_time": BEGIN + 60 * minute,
            }
            for minute in range(minutes)
        ]
        if last in ranks:
            slow = {"rank": last, "host": f"nid\x1b{host:03}", "device": 3, "why": "<i>hot</i>"}
            numbers = {"seconds": 0.5, "usual_seconds": 0.2, "since": BEGIN, "wall_time": BEGIN}
            lines.append({"kind": "straggler", "step": 0, **slow, **numbers})
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (run / "machine" / f"nid{host:03}.jsonl").write_text(text, encoding="utf-8")


def moment(seconds: float) -> str:
    """A time of a job's record."""
    return datetime.fromtimestamp(BEGIN + seconds, timezone.utc).isoformat(timespec="seconds")
