"""Reward backpropagation."""
