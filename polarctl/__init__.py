"""POLAR, policy-discriminative pre-training of reward models: stages for a shell, and a library.

The library is what stands in `__all__`; see `docs/guides/python.md`. Importing it loads nothing
heavy: torch comes when a model is loaded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from polarctl.api import RewardModel, evaluate, read, write

__version__ = "0.1.0"
__all__ = ["RewardModel", "evaluate", "read", "write"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from polarctl import api

        return getattr(api, name)
    raise AttributeError(f"module `polarctl` has no attribute `{name}`")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
