"""Measurements: `python -m nanoflow_jax.bench NAME`."""
