"""The small world of `polarctl quickstart`: its policies, its steps, its report."""
