"""Who runs next: plain Python over token counts; never imports jax, never sees a token."""
