"""One file per model family: what differs from the common body, and its weight map."""
