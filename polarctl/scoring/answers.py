"""What of an output is scored, and which outputs have no answer that could be.

A reward model gives any text a reward. An output whose answer never came, scored as an empty text,
often beats real answers; a policy under reinforcement finds that out. Such outputs get a fixed low
reward instead, the floor. It is a judgement of the policy's output, named in the records and
counted; a scorer that fails is an error and never a floor.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from polarctl.errors import UsageError
from polarctl.model.template import content_text

# Raw. Below what POLAR gives to wrong answers: about -8 to -11 by POLAR-7B, and POLAR-1.8B's mean
# in reinforcement is -10. On the paper's scale -1.5 and -1.0.
REWARD_FLOOR = -20.0
FAULTS = {"unclosed": "in an unfinished thought", "cut_off": "cut off", "empty": "empty"}

_CLOSED = re.compile(r"<think>.*?</think>", re.DOTALL)


def strip_thinking(text: str, *, opened: bool = False) -> str:
    """The answer without its `<think>...</think>` parts and the blank space after them.

    A part that is never closed runs to the end: the answer was not reached, and what was before it
    is left. A `</think>` without its opening closes what the prompt had opened.

    Args:
        text: What the policy wrote.
        opened: The prompt ended in `<think>`, as some chat templates do.
    """
    if not opened and "<think>" not in text and "</think>" not in text:
        return text
    return _after_thinking(text, opened).partition("<think>")[0].lstrip()


def ends_in_thought(text: str, *, opened: bool = False) -> bool:
    """Whether an output ends inside a `<think>` part: its last one is never closed."""
    return "<think>" in _after_thinking(text, opened)


def _after_thinking(text: str, opened: bool) -> str:
    kept = _CLOSED.sub("", "<think>" + text if opened else text)
    return kept.rpartition("</think>")[2]


def floor_of(option: str, default: float | None) -> float | None:
    """The value of a `--reward-floor`: a number, `none`, or `auto` for the default.

    Raises:
        UsageError: Something else.
    """
    if option in ("auto", "none"):
        return default if option == "auto" else None
    try:
        value = float(option)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UsageError(f"`--reward-floor {option}`: no number", hint="a number, auto or none")
    return value


@dataclass(frozen=True, kw_only=True)
class Answers:
    """How outputs are read.

    Attributes:
        strip_thinking: Score without `<think>...</think>`.
        thinking_opened: Prompts end in `<think>`, so outputs begin inside that part.
        floor: Reward of an output without an answer, raw; None: it is scored as what is left of it.
    """

    strip_thinking: bool = False
    thinking_opened: bool = False
    floor: float | None = None

    def text(self, output: Any) -> Any:
        """What is scored of an output, a string or messages."""
        if not self.strip_thinking:
            return output
        return strip_thinking(content_text(output), opened=self.thinking_opened)

    def fault(self, output: Any, *, cut_off: bool = False, wrapper: str = "sft") -> str | None:
        """Why an output gets the floor, a key of `FAULTS`, or None.

        Args:
            output: A string or messages.
            cut_off: The limit of new tokens ended it, not the policy.
            wrapper: Of its prompt. What continues a text (`pretrain`) has no end to reach, so to
                be cut off is not a fault there.
        """
        if self.floor is None:
            return None
        text = content_text(output)
        if self.strip_thinking and ends_in_thought(text, opened=self.thinking_opened):
            return "unclosed"
        if cut_off and wrapper != "pretrain":
            return "cut_off"
        return None if content_text(self.text(output)).strip() else "empty"


AS_THEY_ARE = Answers()
