"""What tests share: jobs and what they leave, limits, waiting, and the budget of ranks at once."""
