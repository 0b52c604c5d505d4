"""The dry run: first passes of a start, of the step and of an evaluation, that find mistakes."""
