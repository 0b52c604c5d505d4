"""What a run tells: the log, the progress, the metrics files, the header and the summary."""
