"""An LLM serving engine in JAX that overlaps operations inside one GPU."""
