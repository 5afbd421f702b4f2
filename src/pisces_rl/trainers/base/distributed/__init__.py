"""Training on several processes: ranks, launchers, gradients, FSDP2, ZeRO."""
