"""Rows from files to host memory, as fast as the file system gives them. Knows no torch."""
