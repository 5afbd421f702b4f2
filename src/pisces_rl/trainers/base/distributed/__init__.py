"""Several processes: ranks, launchers, gradients, ZeRO."""
