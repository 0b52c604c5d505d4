"""Work on whole datasets: pack, describe, index, verify, measure, split, store anew, time."""
