"""Checkpoints that are whole or not there, in safetensors and JSON; nothing is pickled."""
