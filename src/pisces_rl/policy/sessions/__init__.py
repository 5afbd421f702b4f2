"""The kinds of runs of a pipeline: sampling, replay, a single step, and gradients through the sampler."""
