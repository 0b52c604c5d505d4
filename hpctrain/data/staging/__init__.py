"""Copies of the shards on the disk of each node: planned, made, found again, removed."""
