"""Programs as users of Lightning write them, for tests to train here and there."""
