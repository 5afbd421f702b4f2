"""All special cases by model name; every other difference between pipelines is detected at run time."""

#: Autoencoders whose attention mask only broadcasts to a batch of one (diffusers 0.42), so larger batches fail.
ONE_VIDEO_AT_A_TIME = ("AutoencoderKLHunyuanVideo15",)
#: Autoencoders whose decoder keeps the state for the next latent frames, so it can decode chunks of any length.
CAUSAL_CHUNKS = ("AutoencoderKLWan",)
#: Autoencoders whose slices share one cache (diffusers 0.42), so the second slice fails.
WITHOUT_SLICES = ("AutoencoderKLMagvit",)
