"""Training a reward model: its data, its loop, its state, what is said of it."""
