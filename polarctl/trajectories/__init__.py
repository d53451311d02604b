"""From prompts and policies to trajectories, and from trajectories to triples."""
