"""The reward model: its input template, its rows, its attention, its head."""
