"""Weights that a gateway gives to clients that run some of its layers."""
