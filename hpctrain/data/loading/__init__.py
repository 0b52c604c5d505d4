"""From rows in host memory to batches on the device, transformed and normalised."""
