"""From a started process to a proven world and a ready `torch.distributed` process group."""
