"""The data formats of other tools, and our own records turned into one another."""
