"""The HTTP server: `python -m nanoflow_jax.serve`."""
