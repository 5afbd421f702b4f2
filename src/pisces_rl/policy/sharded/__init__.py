"""Weights sharded over several ranks: FSDP2 and ZeRO-3."""
