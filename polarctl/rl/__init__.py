"""Reinforcement fine-tuning by TRL, and what it leaves behind."""
