"""What the tests share: limits, waiting, and the budget of ranks at once."""
