"""Settings of whole runs by name; what the user gives beside a preset wins."""

from __future__ import annotations

import dataclasses
from typing import Any

from polarctl import console
from polarctl.config import with_given
from polarctl.errors import UsageError

# `polar-paper` is what the POLAR paper trains policies with (arXiv 2507.05197), as far as it is not
# PPO's critic. Its clipping range of 0.2 is TRL's. `laptop` fits a small policy into a few GB; LoRA
# takes ten times the learning rate of all weights.
PRESETS: dict[str, dict[str, Any]] = {
    "polar-paper": {
        "lr": 1e-6,
        "batch_size": 1024,
        "epochs": 1.0,
        "temperature": 1.0,
        "top_p": 1.0,
        "kl_coef": 0.0,
    },
    "laptop": {
        "lr": 1e-5,
        "batch_size": 32,
        "num_generations": 4,
        "micro_batch_size": 4,
        "max_new_tokens": 256,
        "lora_rank": 16,
        "save_steps": 20,
    },
}
# The published reward models by width and layers: the scale that the paper's scripts use for each.
_SCALES = {(2048, 24): "polar-1.8b", (4096, 32): "polar-7b"}


def applied(config: Any) -> Any:
    """The options with a preset's values in place of defaults; what was chosen is said.

    Raises:
        UsageError: Everything that the preset says is given beside it.
    """
    if config.preset is None:
        return config
    chosen = dict(PRESETS[config.preset])
    if config.preset == "polar-paper" and config.reward_model is not None:
        chosen["normalize"] = _scale(config.reward_model)
    if config.max_steps is not None:
        chosen.pop("epochs", None)
    chosen = {name: value for name, value in chosen.items() if name not in config.given}
    if not chosen:
        raise UsageError(
            "`--preset` has no effect here: the options beside it say all that it would",
            hint="leave it out",
        )
    values = ", ".join(f"{name} {value}" for name, value in chosen.items())
    console.choice("preset", config.preset, values)
    made = dataclasses.replace(config, **chosen)
    return with_given(made, config.given)


def _scale(reward_model: str) -> str:
    from polarctl.model import reward_model as models

    text = models.load_config(reward_model).get_text_config()
    return _SCALES.get((text.hidden_size, text.num_hidden_layers), "none")
