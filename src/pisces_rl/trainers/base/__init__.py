"""Shared by all trainers: settings, data, processes, run files, and monitoring."""
