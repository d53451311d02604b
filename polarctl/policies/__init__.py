"""Policies and what they write: pool, prompts, decoding, cleaning, pairing."""
