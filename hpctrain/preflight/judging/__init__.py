"""Judges what the probes have measured. Pure: tables in, findings out."""
