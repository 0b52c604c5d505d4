"""Lightning's Trainer over hpctrain: what its arguments are here.

Lightning itself is imported nowhere: modules, data modules, callbacks and loggers are known by the
methods that they have.
"""
