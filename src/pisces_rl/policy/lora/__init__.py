"""Add, check, save and read LoRA adapters on a pipeline."""
