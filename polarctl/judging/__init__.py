"""Generative judges: the question, the server, the reply."""
