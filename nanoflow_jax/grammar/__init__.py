"""Grammars that generated text must follow: checked, compiled, and followed token by token."""
