"""Hand-written GPU kernels, each beside the plain JAX function that says what it means."""
