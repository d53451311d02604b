"""The POLAR reward for verl, under the name that scripts import; see the module it comes from."""

from polarctl.integrations.verl import compute_score, compute_score_batch

__all__ = ["compute_score", "compute_score_batch"]
