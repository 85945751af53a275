"""Programs compiled for a GPU that is not there, and what can be read from them."""
