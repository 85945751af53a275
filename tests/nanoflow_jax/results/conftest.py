"""The small project whose results are verified."""

from result_folders import checkout, first_checkout

__all__ = ["checkout", "first_checkout"]
