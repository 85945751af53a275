"""`python -m nanoflow_jax.generate`: one prompt, or a batch job over a JSONL file."""
