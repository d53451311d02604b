"""The small world of `polarctl quickstart`: its facts, its policies, its report."""
