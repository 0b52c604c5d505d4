"""Checkpoints of a run: what is in one, saved by all ranks, resumed from, or begun with."""
