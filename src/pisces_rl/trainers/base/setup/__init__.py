"""Before training: checks, the pipeline, the policy that it begins with."""
