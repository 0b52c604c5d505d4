"""Modules with a `training_step`: what they return, log and ask for, as their authors know it."""
