"""Rules that look at an answer and say how right it is; no model, and nothing of torch."""
