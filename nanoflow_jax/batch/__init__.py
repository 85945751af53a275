"""Exactly-once batch jobs: a JSONL of requests in, a JSONL of answers out."""
