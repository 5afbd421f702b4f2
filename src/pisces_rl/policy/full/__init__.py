"""Denoisers trained whole: their own weights in place of an adapter."""
