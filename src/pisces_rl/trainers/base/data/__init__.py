"""Data of a trainer: images, videos, pairs, and random seeds."""
