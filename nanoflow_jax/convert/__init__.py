"""`python -m nanoflow_jax.convert`: a Hugging Face folder to Orbax, or back."""
