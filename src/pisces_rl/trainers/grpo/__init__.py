"""GRPO and its variants."""
