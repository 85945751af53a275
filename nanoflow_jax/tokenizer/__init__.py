"""Text to token ids and back, stop strings, chat templates. No jax, no transformers."""
