"""The engine in a process of its own: what it says over its socket, its loop, and its client."""
