"""The pipeline: one verb a file."""
