"""The model over the ranks: DDP, FSDP, parameters without a gradient."""
