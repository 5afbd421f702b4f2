"""A run and its output folder: checkpoints, resume, evaluation, report, adapter files."""
