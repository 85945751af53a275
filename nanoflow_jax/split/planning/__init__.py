"""Decides which of a request's layers run on the client and which on the server."""
