"""From [data] of a config to the datasets of a run: fields, rows and weights of samples."""
