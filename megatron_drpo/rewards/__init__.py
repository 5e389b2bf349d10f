"""Rewards: from a sampled response to a float, in worker processes."""
