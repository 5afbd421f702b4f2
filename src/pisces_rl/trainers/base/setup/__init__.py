"""Setup before training: checks, loading the pipeline, the initial policy."""
