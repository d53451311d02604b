"""What another trainer is told of a run: the policy, the prompts, and the paper's settings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polarctl.config import flag_of, leave_out
from polarctl.errors import UsageError
from polarctl.policies.writer import Writer
from polarctl.records import Record

VERSIONS = {"verl": "0.9", "openrlhf": "0.11"}
# Rollouts of a step, and of one prompt among them. PPO compares with its critic, so one is enough.
PAPER = {"batch_size": 1024, "num_generations": 1}
CRITIC_LR = 1e-5

# What a run of theirs takes from the command line, beside input, output and what is common.
_TAKEN = frozenset(
    "model reward_model server engine num_generations batch_size epochs max_steps lr temperature "
    "top_p max_new_tokens kl_coef normalize strip_thinking reward_floor save_steps".split()
)
_COMMON = frozenset(
    "input output config seed limit shard resume force dry_run rejects quiet verbose no_color "
    "json".split()
)
_SHELL = """#!/usr/bin/env bash
# PPO by {name} {version} with the POLAR reward: see README.md beside this file.
set -euo pipefail
cd "$(dirname "${{BASH_SOURCE[0]}}")"
NODES=${{NODES:-1}}  # machines
GPUS=${{GPUS:-8}}    # GPUs of each
REWARD=${{REWARD:-{reward}}}
SAVE_TO=${{SAVE_TO:-$PWD/trained}}

exec python3 -m {module} \\
{arguments}  "$@"
"""


def check_options(stage: str, config: Any) -> None:
    """Refuse options of training here, which do nothing where another program trains.

    Raises:
        UsageError: There is one, or the batch does not divide, or no server is named.
    """
    for name in config.given:
        if name not in _TAKEN | _COMMON:
            raise UsageError(
                f"`{flag_of(type(config), name)}` has no effect here: it is for `--engine trl`",
                hint=leave_out(stage, config, name),
            )
    if config.server is None:
        raise UsageError(
            f"`--engine {config.engine}` needs `--server URL`, where the reward model will be",
            hint="polarctl serve answers there; it need not run yet",
        )
    if config.reward_model is None:
        raise UsageError(f"`--engine {config.engine}` needs `--reward-model`")
    each = value_of(config, "num_generations")
    if value_of(config, "batch_size") % each:
        raise UsageError(f"--batch-size is not a multiple of --num-generations {each}")


def check_policy(config: Any, writer: Writer) -> None:
    """Raise UsageError for a policy that the engine cannot give prompts to."""
    if config.engine == "verl" and not writer.chat:
        raise UsageError(
            f"{config.model}: its tokenizer has no chat template, and verl knows no other prompts",
            hint="save a chat_template.jinja beside the tokenizer",
        )


def value_of(config: Any, name: str) -> Any:
    """An option, or the paper's value where the user gives none."""
    return getattr(config, name) if name in config.given else PAPER[name]


@dataclass(frozen=True)
class Handover:
    """What is to be written.

    Attributes:
        config: The options of `polarctl rft`.
        records: Prompts with references.
        writer: Knows the policy's tokenizer and chat template.
    """

    config: Any
    records: tuple[Record, ...]
    writer: Writer

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt, rounded up to a multiple of 64."""
        rows = self.writer.encode([record["prompt"] for record in self.records])
        return -(-max(len(ids) for ids in rows if isinstance(ids, list)) // 64) * 64

    @property
    def prompts_per_step(self) -> int:
        """Different prompts of one step."""
        return int(value_of(self.config, "batch_size") // value_of(self.config, "num_generations"))

    def ends(self) -> list[str]:
        """Texts of the tokens with which the policy ends."""
        import transformers

        tokenizer = self.writer.tokenizer
        ids = [tokenizer.eos_token_id]
        try:
            made = transformers.GenerationConfig.from_pretrained(self.config.model)
        except OSError:
            made = None
        if made is not None and made.eos_token_id is not None:
            more = made.eos_token_id
            ids += more if isinstance(more, list) else [more]
        return [tokenizer.decode([one]) for one in dict.fromkeys(ids) if one is not None]


def script(target: Path, job: Handover, module: str, reward: str, arguments: list[str]) -> None:
    """`arguments` stand in the script as they are: those with `$` are put in double quotes."""
    lines = "".join(f"  {argument} \\\n" for argument in arguments)
    text = _SHELL.format(
        name={"verl": "verl", "openrlhf": "OpenRLHF"}[job.config.engine],
        version=VERSIONS[job.config.engine],
        module=module,
        reward=reward,
        arguments=lines,
    )
    (target / "launch.sh").write_text(text, encoding="utf-8")
    (target / "launch.sh").chmod(0o755)


def place_of(name: str) -> str:
    """A folder as every machine finds it, or a Hub id."""
    return str(Path(name).resolve()) if Path(name).is_dir() else name


def plan(config: Any) -> str:
    """A line about what would be written."""
    step, each = (value_of(config, name) for name in PAPER)
    return (
        f"what {config.engine} {VERSIONS[config.engine]} needs: {step:,} rollouts a step, "
        f"{each} of a prompt"
    )
