"""The preflight: everything that a run needs, tried under the real launcher, without training.

A file a family of checks. In each, `check_...` communicates by `Checks`, what measures one rank
follows, and `judge_...` turns the measurements of all ranks into findings: pure, tables in.
"""
