"""Paged KV cache: who owns which page, how a page is laid out, and the attention that reads it."""
