"""What ModelCheckpoint objects tell after a run: the files of its best and its last weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hpctrain.checkpoint.export import best_of
from hpctrain.utils.run_folder import CHECKPOINTS, folder_name, read_latest

BEST, LAST = "best.ckpt", "last.ckpt"


class Checkpoints:
    """Stands for the ModelCheckpoint that Lightning adds where none is given."""

    def __init__(self) -> None:
        self.monitor: str | None = None
        self.best_model_path = ""
        self.last_model_path = ""
        self.best_model_score: Any = None
        self.best_k_models: Mapping[str, Any] = {}
        self.dirpath: str | None = None


def export_for_scripts(run: Path, module: Any) -> tuple[str, float | None]:
    """Write the best weights of a run, or its last, as the file that a script loads afterwards.

    For rank 0.

    Returns:
        Its path, "" where the run has saved nothing, and the metric by which they are the best.

    Raises:
        CheckpointError: if the checkpoint is damaged, or the file cannot be written.
    """
    from hpctrain.checkpoint.lightning_file import export_lightning

    best = best_of(run)
    if best is None and read_latest(run) is None:
        return "", None
    source = run / CHECKPOINTS / folder_name(best.step) if best is not None else run
    target = run / (LAST if best is None else BEST)
    export_lightning(source, target, average=None, module=module)
    return str(target), None if best is None else best.value


def tell(objects: Iterable[Any], run: Path, path: str, score: float | None) -> None:
    """Let ModelCheckpoint objects know what a script asks them afterwards."""
    for each in objects:
        each.best_model_path = each.last_model_path = path
        each.dirpath = str(run)
        if score is not None:
            import torch

            each.best_model_score = each.current_score = torch.tensor(score)
            each.best_k_models = {path: each.best_model_score}
