"""The interface to an unmodified pipeline: its rules, prompts, conditions, latents, decoder, and placement."""
