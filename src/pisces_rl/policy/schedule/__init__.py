"""Noise schedules: a policy's scheduler, its grid, and the numbers of each step."""
