"""The preflight: everything that a run needs, tried under the real launcher, without training.

`probes` measure one rank, `judging` turns the measurements of all ranks into findings and is pure,
and `world`, `network`, `compute`, `data`, `storage` do the communicating in between, by `Checks`.
"""
