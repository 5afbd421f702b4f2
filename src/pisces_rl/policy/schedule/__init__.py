"""Noise schedules: the scheduler of a policy, its grid, and the numbers of each step."""
