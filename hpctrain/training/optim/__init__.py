"""Optimizers, parameter groups, LR scheduler and schedules, EMA."""
