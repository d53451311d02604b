"""What verl and OpenRLHF need to train a policy with the POLAR reward: data, script, instructions.

PPO on several machines is theirs. The settings are the paper's where `rft` does not name others:
`polarctl.rl.other_trainers.PAPER`, actor and critic at 1e-6 and 1e-5, gamma = lambda = 1, clip 0.2.
"""

from __future__ import annotations

import importlib.util
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from polarctl import console, seeding
from polarctl.config import KEY_VARIABLE, flag_of, leave_out
from polarctl.errors import PolarctlError, UsageError
from polarctl.formats import parquet
from polarctl.formats.table import write_verl
from polarctl.model.template import content_text
from polarctl.policies.writer import Writer
from polarctl.records import Record, prompt_id
from polarctl.storage import run_folder

VERSIONS = {"verl": "0.9", "openrlhf": "0.11"}
# Rollouts of a step, and of one prompt among them. PPO compares with its critic, so one is enough.
PAPER = {"batch_size": 1024, "num_generations": 1}
CRITIC_LR = 1e-5
HELD_OUT = 512  # prompts for verl's validation at most; of few prompts a hundredth, at least one

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
    each = _value(config, "num_generations")
    if _value(config, "batch_size") % each:
        raise UsageError(f"--batch-size is not a multiple of --num-generations {each}")


def check_policy(config: Any, writer: Writer) -> None:
    """Raise UsageError for a policy that the engine cannot give prompts to."""
    if config.engine == "verl" and not writer.chat:
        raise UsageError(
            f"{config.model}: its tokenizer has no chat template, and verl knows no other prompts",
            hint="save a chat_template.jinja beside the tokenizer",
        )


def _value(config: Any, name: str) -> Any:
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
        return int(_value(self.config, "batch_size") // _value(self.config, "num_generations"))

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


def write(job: Handover, run: run_folder.Run) -> dict[str, Any]:
    """Write the folder's files, and give the numbers for the manifest.

    Raises:
        UsageError: Too few prompts.
        MissingError: pyarrow is not installed.
        PolarctlError: verl is installed and does not read its data.
    """
    if len(job.records) < job.prompts_per_step:
        console.warn(
            f"{len(job.records):,} prompts are fewer than the {job.prompts_per_step:,} of one step "
            "(--batch-size)"
        )
    target = run.part()
    return (_verl if job.config.engine == "verl" else _openrlhf)(job, target)


def _script(target: Path, job: Handover, module: str, reward: str, arguments: list[str]) -> None:
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


def _place(name: str) -> str:
    """A folder as every machine finds it, or a Hub id."""
    return str(Path(name).resolve()) if Path(name).is_dir() else name


# -- verl -----------------------------------------------------------------------------------------


def _verl(job: Handover, target: Path) -> dict[str, Any]:
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
    _script(target, job, "verl.trainer.main_ppo", config.server, _verl_arguments(job, prompt))
    (target / "README.md").write_text(_verl_page(job, counts), encoding="utf-8")
    checked = _read_by_verl(target, config.model, prompt, counts)
    return {**counts, "read by verl": checked}


def _verl_arguments(job: Handover, prompt: int) -> list[str]:
    config, step = job.config, job.prompts_per_step
    policy, tokens = _place(config.model), prompt + config.max_new_tokens
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
        "actor_rollout_ref.rollout.n": _value(config, "num_generations"),
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
        "model": _place(config.reward_model),
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
       polarctl serve -m {shlex.quote(_place(config.reward_model))} --host 0.0.0.0 --port 8000

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


# -- OpenRLHF -------------------------------------------------------------------------------------


def _openrlhf(job: Handover, target: Path) -> dict[str, Any]:
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
        f"reward_func = reward_function(\n    {_place(config.reward_model)!r},\n{told})\n",
        encoding="utf-8",
    )
    _script(target, job, "openrlhf.cli.train_ppo_ray", url, _openrlhf_arguments(job))
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
    config, step, policy = job.config, job.prompts_per_step, _place(job.config.model)
    batch = _value(config, "batch_size")
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
        "rollout.n_samples_per_prompt": _value(config, "num_generations"),
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

       polarctl serve -m {shlex.quote(_place(config.reward_model))} --port 8000 {told}{more}

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


def plan(config: Any) -> str:
    """A line about what would be written."""
    step, each = (_value(config, name) for name in PAPER)
    return (
        f"what {config.engine} {VERSIONS[config.engine]} needs: {step:,} rollouts a step, "
        f"{each} of a prompt"
    )
