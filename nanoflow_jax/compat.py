"""Every difference between the jax versions that we support, and nothing else.

jax 0.10.2 is the newest for Python 3.11; 0.11 and 0.12 need Python 3.12.
"""
