"""Every option of every stage has an effect, or is refused where it has none.

`TABLE` says for each option how its effect is seen. An option that is not listed fails the test.
`REFUSED` holds a command for every option that some mode of its stage does not use.
"""

import importlib
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from scoring.faulty_server import serving
from tiny import build_lm, build_tokenizer

from polarctl import cli
from polarctl.config import flag_of, keys

TESTS = Path(__file__).parent.parent


@dataclass(frozen=True)
class Case:
    """Two commands that differ in one option, and differ in what they do.

    Attributes:
        without: The command.
        given: The command with the option.
        look: Where the difference is: `files` (and stdout), `status`, or a pattern: its matches on
            stderr.
        before: A command that both find done.
    """

    without: str
    given: str
    look: str = "files"
    before: str = ""


@dataclass(frozen=True)
class Seen:
    """Another test observes the effect: `text` is how it uses the option."""

    path: str
    text: str


def add(base: str, more: str, look: str = "files", before: str = "") -> Case:
    return Case(base, f"{base} {more}", look, before)


def swap(base: str, old: str, new: str, look: str = "files") -> Case:
    assert old in base
    return Case(base, base.replace(old, new), look)


# -- what every stage has -------------------------------------------------------------------------


def voice(command: str, noted: str = "") -> dict[str, Case | Seen]:
    """How a command speaks. `noted` is one that says a note when all goes well."""
    table: dict[str, Case | Seen] = {
        "config": add(command, "--config wrong.yaml", "unknown key"),
        "verbose": add(command, *("--verbose", "option --verbose")),
        "no_color": Seen("cli/test_contract.py", '"--no-color"'),
        "json": add(command + " --config wrong.yaml", "--json", '"level"'),
    }
    return table | ({"quiet": add(noted, "--quiet", ".")} if noted else {})


def records(base: str, noted: str, bad: str, changed: str = "--limit 1") -> dict[str, Case | Seen]:
    """The common options of a stage that writes records.

    Args:
        base: Writes `out.jsonl` from a file that has more than one record.
        noted: Says a note.
        bad: The same as `base` with a bad row in its input.
        changed: An option that makes it another run.
    """
    return {
        **voice(base, noted),
        "input": Case(base, re.sub(r"(\S+) (\S+)", r"\1 more-\2", base, count=1)),
        "output": swap(base, "-o out.jsonl", "-o other.jsonl"),
        "limit": add(base, "--limit 1"),
        "shard": add(base, "--shard 1/2"),
        "resume": Seen("storage/test_write.py", "resume=False"),
        "force": add(f"{base} {changed}", "--force", "status", before=base),
        "dry_run": add(base, "--dry-run"),
        "manifest": add(base, "--manifest elsewhere.json"),
        "rejects": add(bad, "--rejects rejects.jsonl", "status"),
    }


# -- training -------------------------------------------------------------------------------------

TRAIN = (
    "pretrain triples.jsonl -m lm -o made --device cpu --lr 1e-2 --batch-size 4 --max-steps 2 -q"
)
PLAN = TRAIN.replace(" -q", " --dry-run")
EPOCHS = TRAIN.replace("--max-steps 2", "--epochs 0.25")

PRETRAIN: dict[str, Case | Seen] = {
    **voice(TRAIN, TRAIN.replace(" -q", "")),
    "input": swap(TRAIN, "triples.jsonl", "more-triples.jsonl"),
    "output": swap(TRAIN, "-o made", "-o other"),
    "seed": add(TRAIN, "--seed 1"),
    "limit": add(TRAIN, "--limit 3"),
    "resume": Seen("cli/test_every_option.py", '--no-resume", *short'),
    "force": add(TRAIN + " --warmup 1", "--force", "status", before=TRAIN),
    "dry_run": add(TRAIN, "--dry-run"),
    "rejects": add(TRAIN.replace("triples", "bad-triples"), "--rejects r.jsonl", "status"),
    "model": swap(TRAIN, "-m lm", "-m chat"),
    "init_from_config": swap(TRAIN, "-m lm", "--init-from-config lm"),
    "tokenizer": add(TRAIN, "--tokenizer chat"),
    "lr": swap(TRAIN, "1e-2", "0"),
    "batch_size": swap(TRAIN, "--batch-size 4", "--batch-size 2"),
    "epochs": swap(EPOCHS, "0.25", "0.5"),
    "max_steps": swap(TRAIN, "--max-steps 2", "--max-steps 1"),
    "warmup": add(TRAIN, "--warmup 1"),
    "preset": add(TRAIN, "--preset internlm2"),
    "loss": add(TRAIN, "--loss focal"),
    "margin": add(TRAIN, "--margin 1"),
    "penalty": add(TRAIN, "--penalty l2"),
    "penalty_weight": add(TRAIN + " --penalty l2", "--penalty-weight 5"),
    "negatives": add(TRAIN, "--negatives 2"),
    "no_reference": add(TRAIN, "--no-reference"),
    "batch_tokens": add(PLAN, "--batch-tokens 60", "rows of .* tokens"),
    "shared_prefix": add(TRAIN, "--no-shared-prefix"),
    "gradient_checkpointing": add(PLAN, "--gradient-checkpointing", "memory: .*"),
    "max_length": add(TRAIN, "--max-length 64"),
    "max_response_length": add(TRAIN, "--max-response-length 4"),
    "cut_side": add(TRAIN, "--cut-side left"),
    "val_fraction": add(TRAIN, "--val-fraction 0.5"),
    "val_steps": add(TRAIN + " --val-fraction 0.5", "--val-steps 1"),
    "shuffle_window": add(TRAIN, "--shuffle-window 1"),
    "workers": Seen("training/test_encode.py", "workers=2"),
    "lora_rank": add(PLAN, "--lora-rank 1", "memory: .*"),
    "lora_alpha": add(TRAIN + " --lora-rank 2", "--lora-alpha 9"),
    "deepspeed": Seen("stages/test_resume.py", '"--deepspeed", "zero2"'),
    "gpus": swap(PLAN, "--batch-size 4", "--batch-size 4 --gpus 5", "status"),
    "nnodes": add(TRAIN, "--nnodes 2", "status"),
    "device": swap(TRAIN, "--device cpu", "--device cuda:99", "status"),
    "dtype": add(TRAIN, "--dtype bfloat16"),
    "save_steps": add(TRAIN + " --val-fraction 0.5", "--save-steps 1"),
    "save_minutes": Seen("stages/test_training_options.py", '"--save-minutes", "1e-9"'),
    "report_to": add(TRAIN, "--report-to nobody", "status"),
    "plan_for": add(PLAN, "--plan-for H100", "memory: .*"),
    "tokens_per_s": add(PLAN, "--tokens-per-s 9", "time: .*"),
    "base_tokens": add(PLAN.replace("--lr 1e-2", ""), "--base-tokens 1T", "^lr: .*"),
}

# What `finetune` has of TrainConfig is read by the same code.
FINETUNE: dict[str, Case | Seen] = {
    "reference_field": add(TRAIN.replace("pretrain", "finetune"), "--reference-field prompt"),
    "prompt_style": add(
        TRAIN.replace("pretrain", "finetune").replace("-m lm", "-m chat"), "--prompt-style chat"
    ),
}

RFT_BASE = (
    "rft prompts.jsonl -m lm --reward-model rm -o made --device cpu --max-steps 1 --batch-size 4 "
    "--num-generations 2 --max-new-tokens 4 --lr 1e-3 -q"
)
ELSEWHERE = (
    "rft prompts.jsonl -m lm --reward-model rm -o made --max-new-tokens 4 -q --engine openrlhf "
    "--server http://scorer:8000"
)
RFT_PROGRAM = RFT_BASE.replace(" --reward-model rm", "") + " --reward 'command:sleep 0.5'"
RFT_REWARDS: dict[str, Case | Seen] = {
    "reward": add(RFT_BASE, "--reward polar --reward length:9"),
    "reward_model": swap(RFT_BASE, "--reward-model rm", "--reward-model other-rm"),
    "combine": Seen("rl/test_rft_rewards.py", "--combine zsum"),
    "reward_weights": Seen("rl/test_rft_rewards.py", "--reward-weights 0.5"),
    "overlong_buffer": Seen("rl/test_rft_rewards.py", "--overlong-buffer 4"),
    "verifier_timeout": add(RFT_PROGRAM, "--verifier-timeout 0.1", "more than 0.1 s"),
    "verifier_memory": Seen("verifiers/test_programs.py", "memory_gib=0.5"),
    "check": add(RFT_BASE, "--check exact"),
    "check_prompts": Seen("rl/test_rft_check.py", '"--check-prompts", str(held)'),
    "check_steps": Seen("rl/test_rft_check.py", '"--check-steps", "3"'),
    "patience": Seen("rl/test_rft_check.py", '"--patience", "3"'),
    "judge_server": Seen("rl/test_rft_principle.py", "--judge-server {server}"),
    "server": Seen("rl/test_rft_rewards.py", '"--server", server.url'),
    "server_type": Seen("rl/test_rft_rewards.py", '"--server-type", "vllm"'),
    "server_model": Seen("rl/test_rft_rewards.py", '"--server-model", "rm"'),
    "server_batch": Seen("rl/test_rft_rewards.py", '"--server-batch", "2"'),
    "concurrency": Seen("scoring/test_server.py", '"--concurrency"'),
    "server_deadline": Seen("rl/test_rft_rewards.py", '"--server-deadline", "0.2"'),
}
RFT: dict[str, Case | Seen] = {
    **RFT_REWARDS,
    **voice(RFT_BASE, RFT_BASE.replace(" -q", " --dry-run")),
    "input": swap(RFT_BASE, "prompts.jsonl", "more-prompts.jsonl"),
    "output": swap(RFT_BASE, "-o made", "-o other"),
    "seed": add(RFT_BASE, "--seed 1"),
    "limit": add(RFT_BASE, "--limit 1"),
    "shard": add(RFT_BASE.replace(" -q", " --dry-run"), "--shard 1/2", "good: .*"),
    "resume": Seen("cli/test_every_option.py", '--no-resume", *short'),
    "force": add(RFT_BASE + " --seed 1", "--force", "status", before=RFT_BASE),
    "dry_run": add(RFT_BASE, "--dry-run"),
    "rejects": add(RFT_BASE.replace("prompts", "bad-prompts"), "--rejects r.jsonl", "status"),
    "model": swap(RFT_BASE, "-m lm", "-m chat"),
    "num_generations": swap(RFT_BASE, "--num-generations 2", "--num-generations 4"),
    "batch_size": swap(RFT_BASE, "--batch-size 4", "--batch-size 2"),
    "micro_batch_size": add(RFT_BASE, "--micro-batch-size 3", "status"),
    "epochs": Seen("stages/test_rft.py", "epochs=2"),
    "max_steps": swap(RFT_BASE, "--max-steps 1", "--max-steps 2"),
    "lr": swap(RFT_BASE, "--lr 1e-3", "--lr 0"),
    "temperature": add(RFT_BASE, "--temperature 0.01"),
    "top_p": add(RFT_BASE, "--top-p 0.01"),
    "max_new_tokens": swap(RFT_BASE, "--max-new-tokens 4", "--max-new-tokens 8"),
    "kl_coef": add(RFT_BASE, "--kl-coef 0.1"),
    "loss_type": add(RFT_BASE, "--loss-type nothing", "status"),
    "normalize": add(RFT_BASE, "--normalize polar-7b"),
    "strip_thinking": Seen("scoring/test_reward_function.py", "strip_thinking"),
    "reward_floor": Seen("stages/test_rft.py", '"--reward-floor", "-20"'),
    "batch_tokens": Seen("scoring/test_scorer.py", "batch_tokens"),
    "save_steps": Seen("stages/test_rft.py", "--save-steps 1"),
    "save_minutes": Seen("stages/test_rft.py", '"--save-minutes", "1e-9"'),
    "method": add(RFT_BASE, "--method rloo"),
    "preset": Seen("stages/test_rft_methods.py", '"--preset", "laptop"'),
    "rollouts": Seen("engines/test_vllm_rollouts.py", '"--rollouts", "vllm"'),
    "vllm_server": add(RFT_BASE + " --rollouts vllm-server", "--vllm-server http://x", "status"),
    "lora_rank": add(RFT_BASE, "--lora-rank 2"),
    "lora_alpha": add(RFT_BASE + " --lora-rank 2", "--lora-alpha 64"),
    "deepspeed": Seen("stages/test_rft_methods.py", "--deepspeed zero2"),
    "gpus": Seen("stages/test_rft_methods.py", "--gpus 2"),
    "nnodes": add(RFT_BASE, "--nnodes 2", "status"),
    "device": swap(RFT_BASE, "--device cpu", "--device cuda:99", "status"),
    "dtype": add(RFT_BASE, "--dtype bfloat16"),
    "engine": swap(ELSEWHERE, "--engine openrlhf", "--engine verl", "status"),
}

# -- records --------------------------------------------------------------------------------------

SAMPLE_BASE = (
    "sample prompts.jsonl -m lm -o out.jsonl --device cpu --max-new-tokens 6 --samples 1 -q"
)
SAMPLE: dict[str, Case | Seen] = {
    **records(
        SAMPLE_BASE, SAMPLE_BASE.replace(" -q", ""), SAMPLE_BASE.replace("prompts", "bad-prompts")
    ),
    "seed": add(SAMPLE_BASE, "--seed 1"),
    "pool": swap(SAMPLE_BASE, "-m lm", "--pool pool.jsonl"),
    "model": swap(SAMPLE_BASE, "-m lm", "-m chat"),
    "policy": add(SAMPLE_BASE, "--policy me"),
    "samples": swap(SAMPLE_BASE, "--samples 1", "--samples 2"),
    "temperature": add(SAMPLE_BASE, "--temperature 0.01"),
    "top_p": add(SAMPLE_BASE, "--top-p 0.01"),
    "top_k": add(SAMPLE_BASE, "--top-k 1"),
    "max_new_tokens": swap(SAMPLE_BASE, "--max-new-tokens 6", "--max-new-tokens 2"),
    "prefix_tokens": add(SAMPLE_BASE, "--prefix-tokens 1"),
    "tokenizer": add(SAMPLE_BASE + " --prefix-tokens 1", "--tokenizer ./nowhere", "status"),
    "text_field": add(SAMPLE_BASE, "--text-field reference"),
    "clean": add(SAMPLE_BASE.replace("6", "24"), "--no-clean"),
    "drop_shorter": add(SAMPLE_BASE, "--drop-shorter 6"),
    "drop_longer": add(SAMPLE_BASE, "--drop-longer 4"),
    "language": add(SAMPLE_BASE, "--language zz", "status"),
    "batch_size": Seen("stages/test_sample.py", "--batch-size"),
    "concurrency": Seen("stages/test_sample_served.py", "--concurrency"),
    "server_deadline": Seen("stages/test_sample_served.py", "--server-deadline"),
    "device": swap(SAMPLE_BASE, "--device cpu", "--device cuda:99", "status"),
    "dtype": add(SAMPLE_BASE, "--dtype float8", "status"),
    "gpus": add(SAMPLE_BASE.replace("--device cpu", ""), "--gpus 99", "status"),
    "ray": Seen("parallel/test_ray_pool.py", '"--ray", cluster.address'),
    "ray_resource": Seen("parallel/test_ray_pool.py", "ray_resource="),
}

PAIR_BASE = "pair trajectories.jsonl -o out.jsonl -q"
LABEL_BASE = "pair rollouts.jsonl -o out.jsonl --from-rollouts -q"
PAIR: dict[str, Case | Seen] = {
    **records(
        PAIR_BASE, PAIR_BASE.replace(" -q", ""), PAIR_BASE.replace("traj", "bad-traj"), "--seed 1"
    ),
    "seed": add(PAIR_BASE, "--seed 1"),
    "triples_per_prompt": add(PAIR_BASE, "--triples-per-prompt 2"),
    "negatives": add(PAIR_BASE, "--negatives 2"),
    "policies": add(PAIR_BASE, "--policies a --policies b"),
    "exclude_policies": add(PAIR_BASE, "--exclude-policies a"),
    "require": add(PAIR_BASE, "--require c"),
    "equal_chosen": Seen("stages/test_pair.py", '"--equal-chosen", choice'),
    "split": add(PAIR_BASE, "--split train --test-share 0.5"),
    "test_share": add(PAIR_BASE + " --split train", "--test-share 0.9"),
    "max_similarity": add(PAIR_BASE, "--max-similarity 0", "status"),
    "hard_by": Seen("stages/test_pair.py", '"--hard-by", hard_by'),
    "from_rollouts": add("pair rollouts.jsonl -o out.jsonl -q", "--from-rollouts", "status"),
    "label_by": add(LABEL_BASE, "--label-by other"),
    "rule": add(LABEL_BASE, "--rule rank"),
    "threshold": add(LABEL_BASE, "--threshold 2"),
    "min_gap": add(LABEL_BASE + " --rule rank", "--min-gap 3"),
    "ray": Seen("policies/test_on_ray.py", '"--ray", cluster.address'),
}

SCORE_BASE = "score candidates.jsonl -m rm -o out.jsonl --device cpu -q"
CONDITIONS = SCORE_BASE + " --condition-field kind --conditions conditions.yaml"
NO_SERVER = SCORE_BASE.replace("--device cpu", "--server http://127.0.0.1:9")
SCORE: dict[str, Case | Seen] = {
    **records(SCORE_BASE, SCORE_BASE.replace(" -q", ""), SCORE_BASE.replace("cand", "bad-cand")),
    "seed": Seen("judging/test_asking.py", "seed"),
    "model": swap(SCORE_BASE, "-m rm", "-m other-rm"),
    "no_reference": add(SCORE_BASE, "--no-reference"),
    "batch_tokens": Seen("scoring/test_scorer.py", "batch_tokens"),
    "device": swap(SCORE_BASE, "--device cpu", "--device cuda:99", "status"),
    "dtype": add(SCORE_BASE, "--dtype bfloat16"),
    "backend": add(SCORE_BASE, "--backend nothing", "status"),
    "gpus": add(SCORE_BASE.replace("--device cpu", ""), "--gpus 99", "status"),
    "ray": Seen("parallel/test_ray_pool.py", '"--ray", cluster.address'),
    "ray_resource": Seen("parallel/test_ray_pool.py", "ray_resource="),
    "engine_option": Seen("engines/test_vllm.py", '"--engine-option"'),
    "server": Case(SCORE_BASE, NO_SERVER + " --server-deadline 0.1", "status"),
    "server_type": add(NO_SERVER + " --server-deadline 0.1", "--server-type nothing", "status"),
    "server_model": Seen("cli/test_every_option.py", '"--server-model", "rm"'),
    "server_batch": Seen("cli/test_every_option.py", '"--server-batch", "1"'),
    "concurrency": Seen("scoring/test_server.py", '"--concurrency"'),
    "server_deadline": Seen("scoring/test_server.py", '"--server-deadline"'),
    "prompt_style": add(SCORE_BASE, "--prompt-style chat", "status"),
    "reference_in_prompt": add(SCORE_BASE, "--reference-in-prompt", "status"),
    "orders": Seen("judging/test_judge.py", "orders="),
    "max_new_tokens": Seen("stages/test_score_engines.py", '"--max-new-tokens"'),
    "condition_field": swap(CONDITIONS, "--condition-field kind", "--condition-field other"),
    "conditions": swap(CONDITIONS, "conditions.yaml", "more-conditions.yaml"),
    "reference_pooling": add(SCORE_BASE, "--reference-pooling max"),
    "strip_thinking": add(SCORE_BASE, "--strip-thinking"),
    "reward_floor": Seen("stages/test_score.py", '"--reward-floor", "-9.5"'),
    "normalize": add(SCORE_BASE, "--normalize polar-7b"),
    "details": add(SCORE_BASE, "--details"),
    "best_of_n": add(SCORE_BASE, "--best-of-n"),
}

EVAL_BASE = "eval scored.jsonl -o out.jsonl --report report -q"
WITH_MODEL = "eval triples.jsonl -m rm -o out.jsonl --device cpu -q"
EVAL: dict[str, Case | Seen] = {
    **records(
        EVAL_BASE, EVAL_BASE.replace(" -q", " --dry-run"), EVAL_BASE.replace("scored", "bad-scored")
    ),
    "seed": add(EVAL_BASE, "--seed 1"),
    "model": swap(WITH_MODEL, "-m rm", "-m other-rm"),
    "no_reference": add(WITH_MODEL, "--no-reference"),
    "batch_tokens": Seen("scoring/test_scorer.py", "batch_tokens"),
    "device": swap(WITH_MODEL, "--device cpu", "--device cuda:99", "status"),
    "dtype": add(WITH_MODEL, "--dtype bfloat16"),
    "report": swap(EVAL_BASE, "--report report", ""),
    "data": Seen("stages/test_eval_run.py", '"--data", data'),
    "reference_field": Seen("stages/test_eval_run.py", '"--reference-field", "answer"'),
    "reference_from": Seen("stages/test_eval_run.py", '"--reference-from", "other-correct"'),
    "reference_policy": Seen("stages/test_eval_run.py", '"--reference-policy", str(policy)'),
    "embedding": add(EVAL_BASE, "--embedding lm"),
    "trained_on": Seen("evaluation/test_discrimination.py", '"--trained-on", trained'),
    "no_text": add(EVAL_BASE, "--no-text"),
    "benchmark": Seen("evaluation/test_suites.py", '"--benchmark", "rm-bench"'),
    "by": add(EVAL_BASE, "--by kind"),
    "baseline": Seen("stages/test_eval.py", '"--baseline", folder'),
    "min_accuracy": add(EVAL_BASE, "--min-accuracy 1", "status"),
}
del EVAL["resume"]

COMPARE_BASE = "compare scored.jsonl rescored.jsonl -o out.jsonl --report report -q"
COMPARE: dict[str, Case | Seen] = {
    **records(
        COMPARE_BASE,
        COMPARE_BASE.replace(" -q", ""),
        COMPARE_BASE.replace("rescored", "bad-scored"),
        "--no-text",
    ),
    "input": swap(COMPARE_BASE, "compare scored", "compare more-scored"),
    "seed": add(COMPARE_BASE, "--seed 1"),
    "report": swap(COMPARE_BASE, "--report report", ""),
    "by": add(COMPARE_BASE, "--by kind"),
    "no_text": add(COMPARE_BASE, "--no-text"),
    "fail_if_worse": Seen("stages/test_compare.py", '"--fail-if-worse"'),
}
for absent in ("resume", "limit", "shard", "rejects"):
    del COMPARE[absent]

CONVERT_BASE = "convert ranked.jsonl -o out.jsonl -q"
CONVERT: dict[str, Case | Seen] = {
    **records(
        CONVERT_BASE, CONVERT_BASE.replace(" -q", ""), CONVERT_BASE.replace("ranked", "bad-ranked")
    ),
    "seed": add(CONVERT_BASE + " --split train --test-share 0.5", "--seed 1"),
    "from_format": add(CONVERT_BASE, "--from nemo", "status"),
    "to_format": add(CONVERT_BASE, "--to trl"),
    "map": add(CONVERT_BASE, "--map category=kind"),
    "answer": add("convert chats.jsonl -o out.jsonl -q", "--answer output"),
    "ranked": add(CONVERT_BASE + " --to triples", "--ranked adjacent"),
    "split": add(CONVERT_BASE, "--split test"),
    "test_share": add(CONVERT_BASE + " --split test", "--test-share 0.9"),
    "equal_chosen": Seen("stages/test_convert.py", '"--equal-chosen", choice'),
    "by": Seen("stages/test_convert.py", '"--by", "reward", "--min-margin", "1"'),
    "min_margin": Seen("stages/test_convert.py", '"--by", "reward", "--min-margin", "1"'),
    "dedup": Seen("stages/test_convert_dedup.py", '"--dedup"'),
    "best_of_n": add(CONVERT_BASE, "--best-of-n"),
    "join": Seen("stages/test_convert.py", '"--join", "prompt"'),
    "subset": Seen("formats/test_sources.py", '"--subset", "two"'),
    "source_split": Seen("formats/test_sources.py", '"--source-split", "test"'),
}

# -- the others -----------------------------------------------------------------------------------

SERVE: dict[str, Case | Seen] = {
    **{
        name: Seen("serving/test_serve.py", f'"--{name.replace("_", "-")}"')
        for name in (
            "served_model_name host port end_token key_file max_body_mib max_inputs max_text_chars "
            "max_chars prompt_style pooling_data strip_thinking reward_floor"
        ).split()
    },
    "max_connections": Seen("serving/test_slow_clients.py", '"--max-connections", "40"'),
    "request_timeout": Seen("serving/test_slow_clients.py", '"--request-timeout", "2"'),
    **voice("serve -m ./nowhere"),
    "quiet": Seen("serving/test_serve.py", "serving"),
    "model": Seen("serving/test_serve.py", '"-m"'),
    "batch_tokens": Seen("scoring/test_scorer.py", "batch_tokens"),
    "device": swap("serve -m rm --port 0 --device cuda:99", "cuda:99", "nothing", "status"),
    "dtype": swap("serve -m ./nowhere --device cpu", "cpu", "cpu --dtype nothing", "status"),
}

PUSH_BASE = "push data.jsonl me/data --dry-run"
PUSH: dict[str, Case | Seen] = {
    **voice(PUSH_BASE, PUSH_BASE),
    "path": swap(PUSH_BASE, "data.jsonl", "scored.jsonl", "status"),
    "repo_id": swap(PUSH_BASE, "me/data", "me/other", "dataset .*"),
    "force": add("push scored.jsonl me/data --dry-run", "--force", "status"),
    "dry_run": Seen("stages/test_push.py", '"--dry-run"'),
    "type": add(PUSH_BASE, "--type model", "status"),
    "public": add(PUSH_BASE, "--public", "private|public"),
    "revision": add(PUSH_BASE, "--revision next", "branch next"),
    "message": Seen("stages/test_push.py", '"--message"'),
    "license": Seen("stages/test_push.py", '"--license", "apache-2.0"'),
    "datasets": Seen("stages/test_push.py", '"--dataset", "me/triples"'),
    "parquet": add(PUSH_BASE, "--parquet", ".*parquet"),
    "allow_secret": Seen("stages/test_push.py", '"--allow-secret", said[0]'),
}

QUICKSTART: dict[str, Case | Seen] = {
    **voice("quickstart --seed x"),
    "verbose": Seen("cli/test_every_option.py", '"--verbose", "option --verbose"'),
    "quiet": Seen("stages/test_quickstart.py", "quickstart"),
    "output": Seen("stages/test_quickstart.py", '"-o"'),
    "force": Seen("stages/test_quickstart.py", "quickstart"),
    "dry_run": Seen("stages/test_quickstart.py", "quickstart"),
    "fast": Seen("stages/test_quickstart.py", '"--fast"'),
    "seed": Seen("stages/test_quickstart.py", "seed"),
}

SCHEMA: dict[str, Case | Seen] = {
    **voice("schema"),
    "name": swap("schema triple", "triple", "prompt"),
}

VALIDATE: dict[str, Case | Seen] = {
    **voice("validate triples.jsonl", "validate triples.jsonl"),
    "input": Case("validate triples.jsonl", "validate bad-triples.jsonl", "status"),
    "kind": add("validate triples.jsonl", "--kind trajectory", "status"),
}

RATE_BASE = "rate trajectories.jsonl -o out.jsonl --report report -q"
RATE: dict[str, Case | Seen] = {
    **records(
        RATE_BASE, RATE_BASE.replace(" -q", ""), RATE_BASE.replace("traj", "bad-traj"), "--seed 1"
    ),
    "seed": Seen("stages/test_rate.py", '"--seed", "1"'),
    "verifier": add(RATE_BASE, "--verifier length:5"),
    "report": swap(RATE_BASE, "--report report", ""),
}
del RATE["resume"]

SHOW: dict[str, Case | Seen] = {
    **{name: case for name, case in voice("show scored.jsonl").items() if name != "quiet"},
    "input": Case("show scored.jsonl", "show more-scored.jsonl"),
    "limit": add("show scored.jsonl", "--limit 1"),
    "id": add("show trajectories.jsonl", "--id nobody", "status"),
    "worst": add("show scored.jsonl", "--worst 3"),
}

TABLE: dict[str, dict[str, Case | Seen]] = {
    "sample": SAMPLE,
    "pair": PAIR,
    "pretrain": PRETRAIN,
    "finetune": FINETUNE,
    "score": SCORE,
    "serve": SERVE,
    "eval": EVAL,
    "compare": COMPARE,
    "rft": RFT,
    "push": PUSH,
    "convert": CONVERT,
    "quickstart": QUICKSTART,
    "schema": SCHEMA,
    "doctor": {k: v for k, v in voice("doctor").items() if k != "quiet"},
    "validate": VALIDATE,
    "show": SHOW,
    "rate": RATE,
}

RFT_VERIFIED = "rft prompts.jsonl -m lm -o made --reward exact"
# A command for each option that some mode does not use; the option comes last.
JUDGE = "score candidates.jsonl -m rm --backend principle"
SERVER = "score candidates.jsonl -m rm --server http://127.0.0.1:9"
CHECKPOINT = "convert checkpoint rm -o made"
LAWS = "eval scaling a b c"
REFUSED = {
    "sample": {
        "resume": "sample prompts.jsonl -m lm --no-resume",
        "force": "sample prompts.jsonl -m lm --force",
        "policy": "sample prompts.jsonl --pool pool.jsonl --policy me",
        "tokenizer": "sample prompts.jsonl -m lm --tokenizer lm",
        "concurrency": "sample prompts.jsonl -m lm --concurrency 2",
        "server_deadline": "sample prompts.jsonl -m lm --server-deadline 2",
        "ray_resource": "sample prompts.jsonl -m lm --ray-resource GPU=1",
    },
    "pair": {
        "resume": "pair trajectories.jsonl --no-resume",
        "force": "pair trajectories.jsonl --force",
        "policies": LABEL_BASE + " --policies a",
        "exclude_policies": LABEL_BASE + " --exclude-policies a",
        "require": LABEL_BASE + " --require a",
        "equal_chosen": LABEL_BASE + " --rule rank --equal-chosen drop",
        "test_share": PAIR_BASE + " --test-share 0.5",
        "max_similarity": LABEL_BASE + " --max-similarity 0.5",
        "hard_by": LABEL_BASE + " --hard-by names",
        "ray": LABEL_BASE + " --ray auto",
        "label_by": PAIR_BASE + " --label-by check",
        "rule": PAIR_BASE + " --rule rank",
        "threshold": LABEL_BASE + " --rule rank --threshold 1",
        "min_gap": LABEL_BASE + " --min-gap 1",
    },
    "pretrain": {
        "resume": "pretrain triples.jsonl -m lm --no-resume",
        "force": "pretrain triples.jsonl -m lm --force",
        "init_from_config": TRAIN + " --init-from-config lm",
        "epochs": TRAIN + " --epochs 2",
        "val_steps": TRAIN + " --val-steps 1",
        "lora_alpha": TRAIN + " --lora-alpha 1",
        "base_tokens": TRAIN + " --base-tokens 1T",
        "plan_for": TRAIN + " --plan-for H100",
        "tokens_per_s": TRAIN + " --tokens-per-s 9",
    },
    "finetune": {
        "reference_field": "finetune t.jsonl --no-reference --reference-field x",
        "no_reference": "finetune t.jsonl --prompt-style chat --no-reference",
        "max_response_length": "finetune t.jsonl --prompt-style chat --max-response-length 9",
        "cut_side": "finetune t.jsonl --prompt-style chat --cut-side left",
    },
    "score": {
        "resume": "score candidates.jsonl -m rm --no-resume",
        "force": "score candidates.jsonl -m rm --force",
        "batch_tokens": SERVER + " --batch-tokens 9",
        "prompt_style": SERVER + " --prompt-style polar",
        "reference_in_prompt": SERVER + " --reference-in-prompt",
        "device": "score candidates.jsonl -m rm --backend vllm --device cuda:1",
        "dtype": SERVER + " --dtype float32",
        "gpus": SERVER + " --gpus 2",
        "ray": SERVER + " --ray auto",
        "ray_resource": "score candidates.jsonl -m rm --ray-resource GPU=1",
        "engine_option": "score candidates.jsonl -m rm --engine-option a=1",
        "server_model": "score candidates.jsonl -m rm --server-model x",
        "concurrency": "score candidates.jsonl -m rm --concurrency 2",
        "server_deadline": "score candidates.jsonl -m rm --server-deadline 2",
        "server_type": JUDGE + " --server http://127.0.0.1:9 --server-type vllm",
        "server_batch": JUDGE + " --server http://127.0.0.1:9 --server-batch 2",
        "orders": "score candidates.jsonl -m rm --orders 2",
        "max_new_tokens": "score candidates.jsonl -m rm --max-new-tokens 2",
        "seed": "score candidates.jsonl -m rm --seed 2",
        "no_reference": JUDGE + " --no-reference",
        "reference_pooling": JUDGE + " --reference-pooling max",
    },
    "eval": {
        "force": "eval scored.jsonl --force",
        "data": "eval scored.jsonl --data x.jsonl",
        "reference_field": "eval scored.jsonl --reference-field x",
        "reference_from": "eval scored.jsonl --reference-from none",
        "reference_policy": "eval run rm-bench -m rm --reference-policy lm",
        "benchmark": "eval run rm-bench -m rm --benchmark rmb",
        "embedding": "eval run rm-bench -m rm --embedding lm",
        "trained_on": "eval run rm-bench -m rm --trained-on triples.jsonl",
        "shard": "eval run rm-bench -m rm --shard 0/2",
        "manifest": "eval run rm-bench -m rm --manifest m.json",
        "rejects": "eval run rm-bench -m rm --rejects r.jsonl",
        "no_reference": "eval scored.jsonl --no-reference",
        "batch_tokens": "eval scored.jsonl --batch-tokens 9",
        "device": "eval scored.jsonl --device cpu",
        "dtype": "eval scored.jsonl --dtype float32",
        "model": LAWS + " --model rm",
        "no_text": LAWS + " --no-text",
        "by": LAWS + " --by kind",
        "min_accuracy": LAWS + " --min-accuracy 1",
        "baseline": LAWS + " --baseline report",
        "report": LAWS + " --report report",
        "seed": LAWS + " --seed 1",
        "limit": LAWS + " --limit 1",
    },
    "rate": {"force": "rate trajectories.jsonl --force"},
    "compare": {"force": "compare scored.jsonl rescored.jsonl --force"},
    "rft": {
        "reward_model": RFT_VERIFIED + " --reward-model rm",
        "judge_server": RFT_BASE + " --judge-server http://127.0.0.1:9",
        "server": RFT_VERIFIED + " --server http://127.0.0.1:9",
        "server_type": RFT_BASE + " --server-type vllm",
        "server_model": RFT_BASE + " --server-model rm",
        "server_batch": RFT_BASE + " --server-batch 9",
        "concurrency": RFT_BASE + " --concurrency 9",
        "server_deadline": RFT_BASE + " --server-deadline 9",
        "combine": RFT_BASE + " --combine zsum",
        "reward_weights": RFT_BASE + " --reward-weights 2",
        "check_prompts": RFT_BASE + " --check-prompts prompts.jsonl",
        "check_steps": RFT_BASE + " --check-steps 9",
        "patience": RFT_BASE + " --patience 9",
        "verifier_timeout": RFT_BASE + " --verifier-timeout 9",
        "verifier_memory": RFT_BASE + " --verifier-memory 9",
        "resume": RFT_BASE.replace("-o made", "") + " --no-resume",
        "force": RFT_BASE.replace("-o made", "") + " --force",
        "epochs": RFT_BASE + " --epochs 2",
        "loss_type": RFT_BASE + " --method rloo --loss-type dapo",
        "kl_coef": RFT_BASE + " --method distill --kl-coef 0",
        "lora_alpha": RFT_BASE + " --lora-alpha 2",
        "vllm_server": RFT_BASE + " --vllm-server http://x",
        **{
            name: f"rft prompts.jsonl -m lm -o made --method sft {more}"
            for name, more in {
                "reward": "--reward length:9",
                "overlong_buffer": "--overlong-buffer 2",
                "normalize": "--normalize none",
                "strip_thinking": "--strip-thinking",
                "reward_floor": "--reward-floor none",
                "batch_tokens": "--batch-tokens 9",
                "temperature": "--temperature 1",
                "top_p": "--top-p 1",
                "max_new_tokens": "--max-new-tokens 9",
                "rollouts": "--rollouts transformers",
            }.items()
        },
    },
    "convert": {
        "force": "convert ranked.jsonl --force",
        "min_margin": "convert ranked.jsonl --to trl --min-margin 1",
        **{
            name: f"{CHECKPOINT} {more}"
            for name, more in {
                "from_format": "--from trl",
                "by": "--by reward",
                "best_of_n": "--best-of-n",
                "join": "--join id",
                "dedup": "--dedup exact",
                "subset": "--subset a",
                "source_split": "--source-split a",
                "map": "--map a=b",
                "answer": "--answer output",
                "ranked": "--ranked top",
                "split": "--split test",
                "test_share": "--test-share 0.1",
                "seed": "--seed 1",
                "limit": "--limit 1",
                "shard": "--shard 0/1",
                "resume": "--no-resume",
                "manifest": "--manifest m.json",
                "rejects": "--rejects r.jsonl",
            }.items()
        },
    },
}
# Further modes of the same options.
REFUSED_TOO = [
    RFT_VERIFIED + " --normalize polar-7b",
    RFT_VERIFIED + " --reward-floor 0",
    RFT_VERIFIED + " --batch-tokens 9",
    JUDGE + " --batch-tokens 9",
    JUDGE + " --prompt-style chat",
    SERVER + " --device cpu",
    "score candidates.jsonl -m rm --backend vllm --batch-tokens 9",
    "score candidates.jsonl -m rm --no-reference --reference-pooling max",
    "score candidates.jsonl -m rm --prompt-style polar --reference-in-prompt",
    "score candidates.jsonl -m rm --server-type vllm",
    "score candidates.jsonl -m chat-rm --no-reference",
    "score candidates.jsonl -m chat-rm --reference-pooling max",
    "sample prompts.jsonl --pool full-pool.jsonl --temperature 2",
    "sample prompts.jsonl --pool pool.jsonl --concurrency 2",
    "sample prompts.jsonl --pool pool.jsonl --server-deadline 2",
    LAWS + " --shard 0/2",
    LAWS + " -o laws --force",
    LAWS + " --benchmark rmb",
    LAWS + " --data x.jsonl",
    LAWS + " --device cpu",
    TRAIN + " --penalty-weight 1",
    TRAIN + " --preset polar --loss focal --penalty l2 --penalty-weight 1",
    "convert ranked.jsonl -o out.jsonl --seed 1",
    "convert ranked.jsonl -o out.jsonl --test-share 0.1",
    "convert ranked.jsonl -o out.jsonl --ranked top",
    "convert ranked.jsonl -o out.jsonl --by reward",
    "convert ranked.jsonl -o out.jsonl --subset a",
    "convert ranked.jsonl -o out.jsonl --to trl --best-of-n --by reward --min-margin 1",
    "convert ranked.jsonl -o out.jsonl --from native --answer output",
    "convert ranked.jsonl -o out.parquet --to verl --no-resume",
    "push data.jsonl me/data --dry-run --dataset me/other",
    ELSEWHERE + " --save-steps 5 --batch-tokens 9",
    ELSEWHERE + " --dtype float32",
    ELSEWHERE + " --gpus 2",
    ELSEWHERE + " --server-type vllm",
]


# -- the world ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_rm):
    """Small data and models for all commands."""
    import torch
    from transformers import AutoModelForSequenceClassification

    from polarctl.model import reward_model

    folder = tmp_path_factory.mktemp("world")
    build_lm(folder / "lm", seed=1)
    build_lm(folder / "chat", chat=True, seed=2)
    (folder / "rm").symlink_to(tiny_rm)
    torch.manual_seed(9)
    made = reward_model.create(base=str(folder / "chat"))
    torch.nn.init.normal_(made.model.score.weight)
    made.save(folder / "other-rm")
    chat = AutoModelForSequenceClassification.from_pretrained(folder / "chat", num_labels=1)
    chat.save_pretrained(folder / "chat-rm")
    build_tokenizer(chat=True).save_pretrained(folder / "chat-rm")

    words = ["yes it is", "no", "maybe so", "who knows that"]
    triples = [
        {
            "prompt": f"question {i}",
            "reference": words[i % 4],
            "chosen": words[i % 4],
            "rejected": words[(i + 1) % 4],
            "negatives": [words[(i + 2) % 4]],
            "kind": "odd" if i % 2 else "even",
        }
        for i in range(12)
    ]
    prompts = [{"prompt": f"The sum {i} is", "reference": f" {i} boats"} for i in range(4)]
    candidates = [
        {
            "prompt": "q",
            "references": ["yes", "it is so"],
            "candidates": [{"output": "<think>hm</think> yes"}, {"output": "no"}],
            "kind": "a",
            "other": "b",
        }
    ] * 2
    files = {
        "triples": triples,
        "prompts": prompts,
        "candidates": candidates,
        "trajectories": [
            {"prompt": f"p{p}", "output": f"{w} {s} {p}", "policy": w, "sample": s}
            for p in range(6)
            for w in "abc"
            for s in range(2)
        ],
        "rollouts": [
            {
                **{"prompt": f"p{p}", "reference": f"yes {p}", "policy": "lm", "step": s},
                **{"output": f"{w} {s} {p}", "check": s, "other": 1 - s, "reward": p * ord(w)},
            }
            for p in range(6)
            for w in "abc"
            for s in range(3)
        ],
        "scored": [{**t, "rewards": [i % 3, 1.5 + i % 2]} for i, t in enumerate(triples)],
        "rescored": [{**t, "rewards": [i % 2, 0.5]} for i, t in enumerate(triples)],
        "ranked": [
            {
                "prompt": f"p{i}",
                "kind": "x",
                "candidates": [{"output": w, "label": 4 - n} for n, w in enumerate("abcd")],
            }
            for i in range(12)
        ],
        "chats": [
            {
                "messages": [
                    {"role": "user", "content": "q"},
                    {"role": "assistant", "content": "a"},
                ]
            }
        ],
    }
    for name, rows in files.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text)
        again = [{**row, "prompt": "another"} for row in rows[:6] if "prompt" in row]
        more = "".join(json.dumps(row) + "\n" for row in again)
        (folder / f"more-{name}.jsonl").write_text(text + more)
        (folder / f"bad-{name}.jsonl").write_text(f'{text}{{"prompt": 3}}\n')
    pool = {"policy": "p", "model": "chat"}
    (folder / "pool.jsonl").write_text(json.dumps(pool) + "\n")
    (folder / "full-pool.jsonl").write_text(json.dumps({**pool, "temperature": 1.0}) + "\n")
    (folder / "wrong.yaml").write_text("nonsense: 1\n")
    (folder / "conditions.yaml").write_text("a: Be kind.\nb: Be short.\n")
    (folder / "more-conditions.yaml").write_text("a: Be rude.\n")
    return folder


def outcome(command, before, world, folder, monkeypatch, capfd):
    """What a command does in a folder of its own: status, stdout, stderr, files."""
    folder.mkdir(parents=True)
    for path in world.iterdir():
        if path.is_dir():
            (folder / path.name).symlink_to(path)
        else:
            shutil.copy(path, folder)
    given = {path.name for path in folder.iterdir()}
    monkeypatch.chdir(folder)
    if before:
        assert cli.run(shlex.split(before)) == 0
    if "data.jsonl" in command:
        assert cli.run(shlex.split("convert ranked.jsonl -o data.jsonl -q")) == 0
    capfd.readouterr()
    status = cli.run(shlex.split(command))
    said = capfd.readouterr()
    files = {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
        and path.relative_to(folder).parts[0] not in given
        and "manifest.json" not in path.name
    }
    return status, said.out, said.err, files


def seen(case, result):
    status, out, err, files = result
    if case.look == "status":
        return status
    if case.look == "files":
        return status, out, files
    return re.findall(case.look, err, re.MULTILINE)


def stages():
    for stage in cli.STAGES:
        yield stage, importlib.import_module(f"polarctl.stages.{stage}").Config


def test_every_option_is_listed():
    from polarctl.training.options import TrainConfig

    for stage, config_type in stages():
        options = set(keys(config_type))
        if stage == "finetune":
            options -= set(keys(TrainConfig))
        assert options == set(TABLE[stage]), f"{stage}: list how each option's effect is seen"


def test_every_option_that_needs_another_has_a_command_without_it():
    from polarctl.training.options import TrainConfig

    for stage, config_type in stages():
        needs = [need for part in config_type.__mro__ for need in vars(part).get("NEEDS", ())]
        names = {name for need in needs for name in need.options.split()} & set(keys(config_type))
        if stage == "finetune":
            names -= {n for need in TrainConfig.NEEDS for n in need.options.split()}
            names -= {"resume", "force"}
        assert names == set(REFUSED.get(stage, {})), stage


CASES = [
    pytest.param(stage, name, found, id=f"{stage}-{name}")
    for stage, table in TABLE.items()
    for name, found in table.items()
]


@pytest.mark.parametrize(("stage", "name", "found"), CASES)
def test_an_option_changes_what_is_done(stage, name, found, world, tmp_path, monkeypatch, capfd):
    if isinstance(found, Seen):
        assert found.text in (TESTS / found.path).read_text(encoding="utf-8")
        return
    results = [
        outcome(command, found.before, world, tmp_path / part, monkeypatch, capfd)
        for part, command in (("without", found.without), ("given", found.given))
    ]
    assert "Traceback" not in results[0][2] + results[1][2]
    assert seen(found, results[0]) != seen(found, results[1]), results[1][2]
    # `has no effect` would be a difference, too.
    assert "has no effect" not in results[1][2]
    if found.look == "files":
        assert results[0][0] == 0, results[0][2]


REFUSALS = [
    pytest.param(command, flag_of(config_type, name), id=f"{stage}-{name}")
    for stage, config_type in stages()
    for name, command in REFUSED.get(stage, {}).items()
] + [pytest.param(command, None, id=command) for command in REFUSED_TOO]


@pytest.mark.parametrize(("command", "flag"), REFUSALS)
def test_an_option_without_effect_is_refused(command, flag, world, monkeypatch, capfd, tmp_path):
    status, out, err, files = outcome(command, "", world, tmp_path / "a", monkeypatch, capfd)
    first, hint = [line for line in err.splitlines() if ": " in line][-2:]
    assert (status, out) == (2, ""), err
    assert re.match(rf"polarctl: `{flag or '--[a-z-]+'}` has no effect here: ", first), err
    assert hint.startswith("hint: ")
    assert set(files) <= {"data.jsonl"}


def test_no_resume_starts_a_training_run_again(world, tmp_path, monkeypatch, capfd):
    command = shlex.split(TRAIN.replace("--max-steps 2 -q", "--save-steps 1 -q --max-steps"))
    child = subprocess.Popen([sys.executable, "-m", "polarctl", *command, "500"], cwd=world)
    log = world / "made/metrics.jsonl"  # a step's line comes before its checkpoint
    while child.poll() is None and not (log.exists() and len(log.read_bytes().splitlines()) > 3):
        time.sleep(0.01)
    child.kill()
    assert child.wait() == -signal.SIGKILL
    shutil.move(world / "made", tmp_path / "made")
    short = [*command, "2"]
    monkeypatch.chdir(tmp_path)
    for path in world.iterdir():
        (tmp_path / path.name).symlink_to(path)
    assert cli.run(short) == 2
    assert "cannot resume made: `max_steps` was 500 and is now 2" in capfd.readouterr().err
    assert cli.run(["pretrain", "--no-resume", *short[1:]]) == 0
    assert len((tmp_path / "made/metrics.jsonl").read_text().splitlines()) == 2


def test_options_of_a_server_reach_it(world, tmp_path):
    """A server that is told its name is not asked for it; one input a request makes as many."""
    data = str(world / "candidates.jsonl")  # 2 records x 2 references x 2 candidates
    base = ["score", data, "-m", str(world / "rm"), "-q"]
    with serving() as server:
        there = ["--server", server.url, "--server-type", "vllm"]
        assert cli.run([*base, *there, "--server-model", "rm", "-o", str(tmp_path / "a")]) == 0
        few = server.seen["requests"]
        assert cli.run([*base, *there, "--server-batch", "1", "-o", str(tmp_path / "b")]) == 0
        many = server.seen["requests"] - few
    assert many - few >= 7, (few, many)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
