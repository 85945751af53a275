"""Mixes of requests to measure with."""
