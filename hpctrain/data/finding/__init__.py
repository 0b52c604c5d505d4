"""From what a config says to the shards of a dataset: looked for, joined, checked."""
