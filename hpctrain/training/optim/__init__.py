"""What the optimizer does to which parameters, and at which learning rate."""
