"""A model's layers shared between a client and a server: what each part is and how it talks."""
