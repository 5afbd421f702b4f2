"""All that this package knows of a model by its name; what else differs between pipelines is found by asking."""

#: Autoencoders whose attention mask broadcasts against a batch of one only (diffusers 0.42): they fail on any other.
ONE_VIDEO_AT_A_TIME = ("AutoencoderKLHunyuanVideo15",)
#: Autoencoders whose decoder keeps what the next latent frames need, so that these may come in chunks of any length.
CAUSAL_CHUNKS = ("AutoencoderKLWan",)
#: Autoencoders whose slices share what one leaves for the next (diffusers 0.42): the second fails.
WITHOUT_SLICES = ("AutoencoderKLMagvit",)
