"""Mesh and shardings: the only place that builds a mesh."""
