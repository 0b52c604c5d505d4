"""Data nearer to the ranks: shards on a node's own disk, a dataset in a node's memory."""
