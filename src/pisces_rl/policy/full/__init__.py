"""Full fine-tuning: train the denoisers' own weights instead of an adapter."""
