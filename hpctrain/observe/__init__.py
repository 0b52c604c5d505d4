"""What a run reports: the log, the progress, the metrics files, the header and the summary."""
