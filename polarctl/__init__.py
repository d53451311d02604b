"""POLAR: policy-discriminative pre-training of reward models, as command-line stages."""

__version__ = "0.1.0"
