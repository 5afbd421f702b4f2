"""LoRA adapters on a pipeline: added, checked, saved and read."""
