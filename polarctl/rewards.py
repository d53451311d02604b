"""The POLAR reward for RL trainers, under the name that scripts import."""

from polarctl.scoring.reward_function import PolarReward, normalise, strip_thinking

__all__ = ["PolarReward", "normalise", "strip_thinking"]
