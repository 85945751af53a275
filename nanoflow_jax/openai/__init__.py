"""OpenAI request bodies in, OpenAI answers out: for the batch job and the server alike."""
