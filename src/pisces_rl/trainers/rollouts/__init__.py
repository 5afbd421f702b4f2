"""Shared by all methods that sample groups of videos: rollouts, rewards, advantages, losses."""
