"""The files for OpenRLHF: prompts with labels, a launch script, a reward file, instructions."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import orjson

from polarctl import console
from polarctl.config import KEY_VARIABLE
from polarctl.model.template import content_text
from polarctl.records import Record
from polarctl.rl.handover import CRITIC_LR, VERSIONS, Handover, place_of, script, value_of


def write(job: Handover, target: Path) -> dict[str, Any]:
    """Write the files, and give the numbers for the manifest."""
    config, chat = job.config, job.writer.chat
    with open(target / "train.jsonl", "wb") as stream:
        for record in job.records:
            stream.write(orjson.dumps(_openrlhf_row(record, chat)) + b"\n")
    ends = job.ends()
    url = f"{config.server.rstrip('/')}/get_reward"
    if config.normalize != "none":
        console.choice("reward", "reward.py", "the server's replies to OpenRLHF are raw rewards")
        url = "$PWD/reward.py"
    options = {
        "url": config.server,
        "end_tokens": ends,
        "normalize": config.normalize,
        "strip_thinking": config.strip_thinking,
        "reward_floor": config.reward_floor,
    }
    told = "".join(f"    {name}={value!r},\n" for name, value in options.items())
    (target / "reward.py").write_text(
        '"""The POLAR reward for OpenRLHF: `REWARD=$PWD/reward.py ./launch.sh`."""\n\n'
        "from polarctl.integrations.openrlhf import reward_function\n\n"
        f"reward_func = reward_function(\n    {place_of(config.reward_model)!r},\n{told})\n",
        encoding="utf-8",
    )
    script(target, job, "openrlhf.cli.train_ppo_ray", url, _openrlhf_arguments(job))
    page = _openrlhf_page(job, ends)
    (target / "README.md").write_text(page, encoding="utf-8")
    return {"train prompts": len(job.records)}


def _openrlhf_row(record: Record, chat: bool) -> dict[str, Any]:
    """A prompt, and as its label what POLAR compares: the prompt without a template's markup."""
    text = content_text(record["prompt"])
    label = {"prompt": text, "reference": content_text(record["reference"])}
    label["wrapper"] = record.get("wrapper", "sft" if chat else "pretrain")
    if not chat:
        return {"prompt": text, "label": label}
    turns = record["prompt"]
    if isinstance(turns, str):
        turns = [{"role": "user", "content": turns}]
    turns = [{"role": turn["role"], "content": content_text([turn])} for turn in turns]
    return {"prompt": turns, "label": label}


def _openrlhf_arguments(job: Handover) -> list[str]:
    config, step, policy = job.config, job.prompts_per_step, place_of(job.config.model)
    batch = value_of(config, "batch_size")
    values: dict[str, Any] = {
        "actor.model_name_or_path": policy,
        "critic.model_name_or_path": policy,
        "reward.remote_url": "$REWARD",
        "data.prompt_dataset": "$PWD/train.jsonl",
        "data.input_key": "prompt",
        "data.label_key": "label",
        **({"data.apply_chat_template": None} if job.writer.chat else {}),
        "data.max_len": job.longest + config.max_new_tokens,
        "rollout.max_new_tokens": config.max_new_tokens,
        "rollout.batch_size": step,
        "rollout.n_samples_per_prompt": value_of(config, "num_generations"),
        "rollout.temperature": config.temperature,
        "rollout.top_p": config.top_p,
        "train.batch_size": batch,
        "train.max_epochs": 1,
        "train.num_episodes": max(1, round(config.epochs)),
        **({"data.max_samples": config.max_steps * step} if config.max_steps else {}),
        "train.seed": config.seed,
        "actor.adam.lr": config.lr,
        "actor.eps_clip": 0.2,
        "critic.adam.lr": CRITIC_LR,
        "algo.advantage.estimator": "gae",
        "algo.advantage.gamma": 1.0,
        "algo.advantage.lambd": 1.0,
        "algo.kl.init_coef": config.kl_coef,
        "actor.num_nodes": "$NODES",
        "actor.num_gpus_per_node": "$GPUS",
        "critic.num_nodes": "$NODES",
        "critic.num_gpus_per_node": "$GPUS",
        "ref.num_nodes": "$NODES",
        "ref.num_gpus_per_node": "$GPUS",
        "vllm.num_engines": '"$((NODES * GPUS))"',
        "train.colocate_all": None,
        "vllm.enable_sleep": None,
        "vllm.gpu_memory_utilization": 0.5,
        "ds.enable_sleep": None,
        "ds.zero_stage": 3,
        "actor.gradient_checkpointing_enable": None,
        "ckpt.output_dir": "$SAVE_TO/policy",
        "ckpt.path": "$SAVE_TO/steps",
        "ckpt.save_steps": config.save_steps,
        "ckpt.load_enable": None,
    }
    return [_option(name, value) for name, value in values.items()]


def _option(name: str, value: Any) -> str:
    if value is None:
        return f"--{name}"
    if isinstance(value, str) and value.startswith("$"):
        return f'--{name} "{value}"'
    return f"--{name} {value if str(value)[:1] == chr(34) else shlex.quote(str(value))}"


def _openrlhf_page(job: Handover, ends: list[str]) -> str:
    config = job.config
    told = " ".join(f"--end-token {shlex.quote(end)}" for end in ends)
    more = " --strip-thinking" if config.strip_thinking else ""
    more += f" --reward-floor {config.reward_floor}" if config.reward_floor != "auto" else ""
    return f"""# PPO by OpenRLHF {VERSIONS["openrlhf"]} with the POLAR reward

`train.jsonl` has {len(job.records):,} prompts; the label of each is its reference and its prompt
without a chat template. `launch.sh` holds all settings. This folder and the policy have to be found
at the same paths by every machine.

1. The reward model answers OpenRLHF's protocol, which sends no key. So it listens on the machine
   itself, and one runs on each machine:

       polarctl serve -m {shlex.quote(place_of(config.reward_model))} --port 8000 {told}{more}

   `launch.sh` expects it at {config.server}; `REWARD=URL/get_reward ./launch.sh` names another.
   For one server with a key ({KEY_VARIABLE}), or a scale of the reward (`--normalize`), there is
   `REWARD=$PWD/reward.py ./launch.sh`. It needs, on every machine, in OpenRLHF's environment:

       pip install --no-deps polarctl
       pip install httpx2 jsonlines msgspec orjson rich typer zstandard

2. The Ray cluster:

       ray start --head                     # on the first machine
       ray start --address FIRST:6379       # on the others

3. On the first machine:

       NODES=1 GPUS=8 ./launch.sh

A reward that cannot be had is logged by OpenRLHF, and the run ends where it comes to use it. Look
for `Failed to fetch reward` in the log. The same command goes on after the last checkpoint.
"""
