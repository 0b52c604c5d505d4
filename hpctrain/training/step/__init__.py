"""One step of training: what it computes with, and how the ranks agree on the result."""
