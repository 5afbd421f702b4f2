"""A run and its folder: checkpoints, resume, evaluation, report, adapter files."""
