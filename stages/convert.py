"""Placeholder for convert."""

from dataclasses import dataclass

from polarctl.config import Common


@dataclass(frozen=True, kw_only=True)
class Config(Common):
    """Options."""


def run(config: Config) -> None:
    """Run."""
