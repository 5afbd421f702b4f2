"""Weights in parts on several ranks: FSDP2 and ZeRO-3."""
