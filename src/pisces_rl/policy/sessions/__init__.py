"""What may run around a call of the pipeline: sampling, replay, one step, gradients through the sampler."""
