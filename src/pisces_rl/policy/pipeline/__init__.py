"""What is asked of an unmodified pipeline: its rules, prompts, conditions, latents, decoder, and where it lies."""
