"""The data of a run: opened, transformed, staged on nodes, or brought as objects."""
