"""The files for verl: Parquet, a launch script with the paper's PPO settings, instructions."""

from __future__ import annotations

import importlib.util
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from polarctl import console, seeding
from polarctl.config import KEY_VARIABLE
from polarctl.errors import PolarctlError, UsageError
from polarctl.formats import parquet
from polarctl.formats.table import write_verl
from polarctl.records import prompt_id
from polarctl.rl.handover import CRITIC_LR, VERSIONS, Handover, place_of, script, value_of

HELD_OUT = 512  # prompts to validate on at most; of few prompts a hundredth, at least one


def write(job: Handover, target: Path) -> dict[str, Any]:
    """Write the files, and give the numbers for the manifest.

    Raises:
        UsageError: Too few prompts.
        MissingError: pyarrow is not installed.
        PolarctlError: verl is installed and does not read its data.
    """
    config = job.config
    order = sorted(
        range(len(job.records)),
        key=lambda i: (seeding.derive(config.seed, "held out", prompt_id(job.records[i])), i),
    )
    if len(order) < 2:
        raise UsageError("one prompt: verl needs one to train on and one to validate on")
    held = set(order[: min(HELD_OUT, max(1, len(order) // 100))])
    counts = {}
    for name, rows in (
        ("train", [r for i, r in enumerate(job.records) if i not in held]),
        ("val", [r for i, r in enumerate(job.records) if i in held]),
    ):
        made = [row for record in rows for row in write_verl(dict(record))]
        parquet.write_rows(target / f"{name}.parquet", made)
        counts[f"{name} prompts"] = len(made)
    prompt = job.longest
    script(target, job, "verl.trainer.main_ppo", config.server, _verl_arguments(job, prompt))
    (target / "README.md").write_text(_verl_page(job, counts), encoding="utf-8")
    checked = _read_by_verl(target, config.model, prompt, counts)
    return {**counts, "read by verl": checked}


def _verl_arguments(job: Handover, prompt: int) -> list[str]:
    config, step = job.config, job.prompts_per_step
    policy, tokens = place_of(config.model), prompt + config.max_new_tokens
    values: dict[str, Any] = {
        "algorithm.adv_estimator": "gae",
        "algorithm.gamma": 1.0,
        "algorithm.lam": 1.0,
        "algorithm.use_kl_in_reward": config.kl_coef > 0,
        "algorithm.kl_ctrl.kl_coef": config.kl_coef,
        "data.train_files": "$PWD/train.parquet",
        "data.val_files": "$PWD/val.parquet",
        "data.train_batch_size": step,
        "data.max_prompt_length": prompt,
        "data.max_response_length": config.max_new_tokens,
        "data.seed": config.seed,
        "actor_rollout_ref.model.path": policy,
        "actor_rollout_ref.actor.optim.lr": config.lr,
        "actor_rollout_ref.actor.ppo_epochs": 1,
        "actor_rollout_ref.actor.ppo_mini_batch_size": step,
        "actor_rollout_ref.actor.clip_ratio": 0.2,
        "actor_rollout_ref.actor.use_kl_loss": False,
        "actor_rollout_ref.actor.use_dynamic_bsz": True,
        "actor_rollout_ref.actor.ppo_max_token_len_per_gpu": max(16384, tokens),
        "actor_rollout_ref.rollout.name": "vllm",
        "actor_rollout_ref.rollout.n": value_of(config, "num_generations"),
        "actor_rollout_ref.rollout.temperature": config.temperature,
        "actor_rollout_ref.rollout.top_p": config.top_p,
        "critic.model.path": policy,
        "critic.optim.lr": CRITIC_LR,
        "critic.ppo_epochs": 1,
        "critic.ppo_max_token_len_per_gpu": max(32768, tokens),
        "reward.custom_reward_function.path": "pkg://polarctl.integrations.verl",
        "reward.custom_reward_function.name": "compute_score",
    }
    given = {
        "model": place_of(config.reward_model),
        "url": "$REWARD",
        "normalize": config.normalize,
        "strip_thinking": config.strip_thinking,
        "reward_floor": config.reward_floor,
    }
    values |= {f"+reward.custom_reward_function.reward_kwargs.{key}": v for key, v in given.items()}
    values |= {
        "trainer.nnodes": "$NODES",
        "trainer.n_gpus_per_node": "$GPUS",
        "trainer.total_epochs": max(1, round(config.epochs)),
        **({"trainer.total_training_steps": config.max_steps} if config.max_steps else {}),
        "trainer.save_freq": config.save_steps,
        "trainer.test_freq": -1,
        "trainer.val_before_train": False,
        "trainer.logger": "console",
        "trainer.project_name": "polarctl",
        "trainer.experiment_name": Path(config.output).name,
        "trainer.default_local_dir": "$SAVE_TO",
    }
    return [_assigned(key, value) for key, value in values.items()]


def _assigned(key: str, value: Any) -> str:
    if isinstance(value, str) and value.startswith("$"):
        return f'{key}="{value}"'
    return f"{key}={shlex.quote(str(value))}"


def _read_by_verl(target: Path, policy: str, prompt: int, counts: dict[str, Any]) -> bool:
    """Whether verl's own data set has read both files, in a process of its own."""
    if importlib.util.find_spec("verl") is None:
        console.note("rft: verl is not installed here, so its data set has not read the files")
        return False
    for name in ("train", "val"):
        words = [str(target / f"{name}.parquet"), policy, str(prompt)]
        found = subprocess.run(
            [sys.executable, "-c", _READ, *words], capture_output=True, text=True, check=False
        )
        lines = found.stdout.splitlines()
        if found.returncode or not lines or lines[-1] != str(counts[f"{name} prompts"]):
            tail = (found.stderr or found.stdout).strip().splitlines()[-1:]
            raise PolarctlError(
                f"verl's data set does not read {name}.parquet: {' '.join(tail)}",
                hint=f"files are for verl {VERSIONS['verl']}",
            )
    console.note("rft: verl's own data set has read train.parquet and val.parquet")
    return True


_READ = """
import sys
import tempfile
from omegaconf import OmegaConf
from transformers import AutoTokenizer
from verl.utils.dataset.rl_dataset import RLHFDataset
with tempfile.TemporaryDirectory() as cache:
    options = {"max_prompt_length": int(sys.argv[3]), "filter_overlong_prompts": True}
    options |= {"cache_dir": cache, "filter_overlong_prompts_workers": None}
    tokenizer = AutoTokenizer.from_pretrained(sys.argv[2])
    rows = RLHFDataset([sys.argv[1]], tokenizer, OmegaConf.create(options))
    assert all(row["raw_prompt"] and row["extra_info"]["prompt"] for row in rows)
    print(len(rows))
"""


def _verl_page(job: Handover, counts: dict[str, Any]) -> str:
    config = job.config
    return f"""# PPO by verl {VERSIONS["verl"]} with the POLAR reward

Prompts with their references: {counts["train prompts"]:,} in `train.parquet`,
{counts["val prompts"]:,} others in `val.parquet`. `launch.sh` holds all settings. This folder, the
policy and the reward model's tokenizer have to be found at the same paths by every machine.

1. Where the reward model is to be (a GPU of its own):

       export {KEY_VARIABLE}=SECRET
       polarctl serve -m {shlex.quote(place_of(config.reward_model))} --host 0.0.0.0 --port 8000

   `launch.sh` expects it at {config.server}; `REWARD=URL ./launch.sh` names another place.
   `vllm serve MODEL --runner pooling` and SGLang answer as well.

2. On every machine of the cluster, in the environment that has verl:

       pip install --no-deps polarctl
       pip install httpx2 jsonlines msgspec orjson rich typer zstandard
       export {KEY_VARIABLE}=SECRET

   verl wants an older transformers than polarctl's own commands; the reward function needs neither.

3. The Ray cluster:

       ray start --head                     # on the first machine
       ray start --address FIRST:6379       # on the others

4. On the first machine:

       NODES=1 GPUS=8 ./launch.sh

   Words after it are added to verl's command: `./launch.sh trainer.logger='["console","wandb"]'`.

A reward that cannot be had ends the run with its cause. `trainer.resume_mode` is `auto`: the same
command goes on after the last checkpoint in `trained/` (every {config.save_steps:,} steps).
"""
