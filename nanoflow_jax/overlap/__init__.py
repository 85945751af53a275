"""Compiles a step for a GPU that need not be there and says what of it may run side by side."""
