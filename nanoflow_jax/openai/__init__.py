"""OpenAI request bodies in, OpenAI answers out: no jax, no engine, no files."""
