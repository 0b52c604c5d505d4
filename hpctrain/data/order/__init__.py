"""Which samples there are, in which order, and which rank serves which: pure arithmetic."""
