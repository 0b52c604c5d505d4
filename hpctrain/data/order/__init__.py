"""Which sample comes when, and which rank serves it: arithmetic, and no I/O."""
