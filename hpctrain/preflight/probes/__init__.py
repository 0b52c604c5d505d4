"""What the preflight measures. Nothing here judges."""
