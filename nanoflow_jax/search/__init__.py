"""Finds how a model is best served: what bounds it, and which pipeline hides what."""
