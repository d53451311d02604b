"""The checkpoints published with POLAR (InternLM2 reward models), without their remote code."""
