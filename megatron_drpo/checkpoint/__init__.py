"""A run's own checkpoints: written, hashed, found again and read back."""
