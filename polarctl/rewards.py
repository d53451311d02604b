"""The POLAR reward for RL trainers, under the name that scripts import."""

from polarctl.scoring.answers import REWARD_FLOOR, strip_thinking
from polarctl.scoring.reward_function import PolarReward, normalise

__all__ = ["REWARD_FLOOR", "PolarReward", "normalise", "strip_thinking"]
