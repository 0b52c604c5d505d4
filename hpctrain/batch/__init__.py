"""Life in a batch system: signals, the agreed stop, and word of how a run ended."""
