"""OpenRLHF's own code reads our files and asks our reward: make test-trainers."""

import argparse
import ast
import asyncio
import importlib.util
import os
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from trainers.conftest import score


@pytest.fixture(scope="module")
def arguments(folder, served, tmp_path_factory):
    """OpenRLHF's arguments from `launch.sh`, by its own parser and checks."""
    stub = tmp_path_factory.mktemp("bin") / "python3"
    stub.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    stub.chmod(0o755)
    environment = {**os.environ, "REWARD": f"{served}/get_reward", "GPUS": "1"}
    environment["PATH"] = f"{stub.parent}:{os.environ['PATH']}"
    found = subprocess.run(
        ["bash", str(folder / "openrlhf" / "launch.sh")],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    # The module itself wants vLLM and DeepSpeed with CUDA; its parser is in `__main__`'s block.
    source = importlib.util.find_spec("openrlhf").submodule_search_locations[0]
    tree = ast.parse(Path(source, "cli", "train_ppo_ray.py").read_text())
    block = tree.body[-1]
    assert isinstance(block, ast.If)
    block.body.pop()  # `train(args)`
    names = {"argparse": argparse, "os": os, "datetime": datetime}
    before, sys.argv = sys.argv, ["train_ppo_ray", *found.stdout.splitlines()[2:]]
    try:
        exec(compile(ast.Module(block.body, []), "parser", "exec"), names)
    finally:
        sys.argv = before
    return names["args"]


@pytest.fixture(scope="module")
def tokenizer(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder / "chat")


@pytest.fixture(scope="module")
def rows(arguments, tokenizer):
    import datasets
    from openrlhf.datasets.prompts_dataset import PromptDataset

    table = datasets.load_dataset("json", data_files=arguments.data.prompt_dataset)["train"]
    strategy = SimpleNamespace(args=arguments, is_rank_0=lambda: True)
    return PromptDataset(table, tokenizer, strategy)


class Policy:
    """The tiny policy behind the two calls that the executor makes of vLLM's engine."""

    def __init__(self, folder, tokenizer):
        from transformers import AutoModelForCausalLM

        self.model, self.tokenizer = AutoModelForCausalLM.from_pretrained(folder), tokenizer

    async def generate(self, ids, params, multi_modal_data=None):
        end = self.tokenizer.eos_token_id
        torch.manual_seed(len(ids))
        whole = self.model.generate(
            torch.tensor([ids]), max_new_tokens=5, do_sample=True, eos_token_id=None
        )[0].tolist()
        made = [one for one in whole[len(ids) :] if one != end] + [end]
        return SimpleNamespace(
            outputs=[SimpleNamespace(token_ids=made, finish_reason="stop", logprobs=None)]
        )


def test_openrlhf_knows_every_setting_and_finds_them_right(arguments):
    assert arguments.actor.adam.lr == 1e-6 and arguments.critic.adam.lr == 1e-5
    assert arguments.train.batch_size == arguments.rollout.batch_size == 1024
    assert arguments.algo.kl.init_coef == 0 and arguments.data.apply_chat_template
    assert arguments.critic.model_name_or_path == arguments.actor.model_name_or_path


@pytest.mark.parametrize("way", ["server", "file"])
def test_openrlhfs_executor_gets_the_rewards_of_score(
    way, arguments, rows, folder, served, tokenizer
):
    from openrlhf.utils.agent import SingleTurnAgentExecutor

    place = arguments.reward.remote_url
    if way == "file":
        text = (folder / "openrlhf" / "reward.py").read_text()
        file = folder / "here.py"
        file.write_text(text.replace("http://127.0.0.1:1", served))
        place = [str(file)]
    executor, policy = SingleTurnAgentExecutor(place), Policy(folder / "chat", tokenizer)
    params = SimpleNamespace(max_tokens=5, logprobs=None)

    async def execute():
        return [
            await executor.execute(prompt, label, params, 128, tokenizer, policy)
            for _, prompt, label, _ in (rows[i] for i in range(4))
        ]

    found = asyncio.run(execute())
    asked = [
        {
            "prompt": f"What is {i} + 4?",
            "reference": f"It is {i + 4}.",
            "output": tokenizer.decode(one["observation_tokens"][one["action_ranges"][0][0] : -1]),
        }
        for i, one in enumerate(found)
    ]
    rewards = [torch.as_tensor(one["reward"]).item() for one in found]
    assert rewards == score(folder, asked) and len(set(rewards)) == 4


def test_a_server_that_is_not_there_is_an_error_at_the_start(folder):
    from openrlhf.utils.agent import SingleTurnAgentExecutor

    text = (folder / "openrlhf" / "reward.py").read_text()
    file = folder / "fails.py"
    file.write_text(text.replace("normalize=", "server_deadline=0,\n    normalize="))
    with pytest.raises(Exception, match="no server answers"):
        SingleTurnAgentExecutor([str(file)])


def test_a_reward_that_fails_amid_the_run_is_never_a_number(rows, folder, served, tokenizer):
    """OpenRLHF logs it and has no reward. Its trainer asks for one that is there, and stops."""
    from openrlhf.utils.agent import SingleTurnAgentExecutor

    executor = SingleTurnAgentExecutor([f"{served}/get_reward"])
    executor.reward_func = lambda *_: 1 / 0
    params = SimpleNamespace(max_tokens=5, logprobs=None)
    _, prompt, label, _ = rows[0]
    policy = Policy(folder / "chat", tokenizer)
    found = asyncio.run(executor.execute(prompt, label, params, 128, tokenizer, policy))
    assert found["reward"] is None and found["scores"] is None
