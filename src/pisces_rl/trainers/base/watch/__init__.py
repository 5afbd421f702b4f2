"""Monitoring of a run: metrics, timeline, the plan of a step, callbacks."""
