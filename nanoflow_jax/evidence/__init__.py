"""Verifies result folders, lists them, and writes the README's figures."""
