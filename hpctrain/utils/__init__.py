"""What every floor needs: files written whole, what the kernel knows of processes, text."""
