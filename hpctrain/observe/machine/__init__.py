"""Machine figures of a run: recorded on a thread of each node, written, and read again."""
