"""Life in a batch system: the time left, the agreed stop, exit.json and job scripts."""
