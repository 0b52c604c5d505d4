"""Small reference models, to start from and to compare one's own with."""
