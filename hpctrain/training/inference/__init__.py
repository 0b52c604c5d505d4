"""A trained model at work: its metrics on a dataset, and its predictions for every sample."""
