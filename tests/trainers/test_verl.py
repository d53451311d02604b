"""verl's own code reads our files and asks our reward, on a local Ray cluster: make test-trainers.

The files come from the project's own environment, as a user's would: verl's has another
transformers. Of verl everything runs that needs no GPU: configuration, data set, reward managers.
"""

import asyncio
import os
import subprocess

import numpy as np
import pytest
import torch
from trainers.conftest import OUTPUTS, wanted_rewards


@pytest.fixture(scope="module")
def arguments(folder, served, tmp_path_factory):
    """The words that `launch.sh` gives to verl."""
    stub = tmp_path_factory.mktemp("bin") / "python3"
    stub.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    stub.chmod(0o755)
    path = f"{stub.parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "REWARD": served, "GPUS": "1"}
    words = ["bash", str(folder / "verl" / "launch.sh")]
    found = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
    return found.stdout.splitlines()[2:]


@pytest.fixture(scope="module")
def config(arguments):
    """verl's configuration: hydra refuses every name that it does not know."""
    from hydra import compose, initialize_config_module

    with initialize_config_module("verl.trainer.config", version_base=None):
        return compose("ppo_trainer", overrides=arguments)


@pytest.fixture(scope="module")
def tokenizer(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder / "chat")


@pytest.fixture(scope="module")
def rows(config, folder, tokenizer):
    from verl.utils.dataset.rl_dataset import RLHFDataset

    return RLHFDataset(config.data.train_files, tokenizer, config.data)


@pytest.fixture(scope="module")
def batch(rows, tokenizer):
    """Four rollouts as verl's trainer holds them."""
    return batch_of(rows, tokenizer)


def batch_of(rows, tokenizer):
    from tensordict import TensorDict
    from verl import DataProto
    from verl.utils.dataset.rl_dataset import collate_fn

    kept = [rows[i] for i in range(len(OUTPUTS))]
    prompt = torch.ones(len(kept), 3, dtype=torch.long)
    answers = [tokenizer(text)["input_ids"] for text in OUTPUTS]
    longest = max(map(len, answers))
    ids = torch.tensor([a + [tokenizer.pad_token_id] * (longest - len(a)) for a in answers])
    mask = torch.tensor([[1] * len(a) + [0] * (longest - len(a)) for a in answers])
    tensors = {
        "prompts": prompt,
        "responses": ids,
        "input_ids": torch.cat([prompt, ids], 1),
        "attention_mask": torch.cat([torch.ones_like(prompt), mask], 1),
    }
    found = collate_fn(kept)
    others = {name: value for name, value in found.items() if isinstance(value, np.ndarray)}
    return DataProto(TensorDict(tensors, batch_size=len(kept)), others)


def test_verl_knows_every_setting_and_finds_them_right(config):
    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.utils.config import validate_config

    validate_config(config, need_reference_policy(config), need_critic(config))
    assert need_critic(config) and not need_reference_policy(config)
    assert config.data.train_batch_size == 1024 and config.critic.optim.lr == 1e-5


def test_verls_data_set_reads_all_rows(rows, folder):
    assert len(rows) == 11  # one of twelve is held out
    row = rows[0]
    assert row["raw_prompt"][0]["role"] == "user"
    assert row["extra_info"]["prompt"] == row["raw_prompt"]


def test_verls_naive_manager_gets_the_rewards_of_score(config, batch, tokenizer, folder):
    from verl.trainer.ppo.reward import load_reward_manager

    async def ask():
        manager = load_reward_manager(config, tokenizer)
        return [await manager.run_single(batch[i : i + 1]) for i in range(len(batch))]

    found = [reply["reward_score"] for reply in asyncio.run(ask())]
    assert found == wanted_rewards(folder, batch.non_tensor_batch)


def test_verls_batch_manager_gets_them_too(config, batch, tokenizer, folder):
    from functools import partial

    from verl.workers.reward_manager import get_reward_manager_cls

    from polarctl.integrations.verl import compute_score_batch

    kwargs = config.reward.custom_reward_function.reward_kwargs
    manager = get_reward_manager_cls("batch")(
        tokenizer, 0, partial(compute_score_batch, **kwargs), "data_source"
    )
    tensor = manager(batch)
    assert tensor.sum(-1).tolist() == wanted_rewards(folder, batch.non_tensor_batch)


@pytest.fixture(scope="module")
def ray_cluster():
    import ray

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield ray
    ray.shutdown()


def test_verls_reward_workers_get_them_on_a_ray_cluster(ray_cluster, config, batch, folder):
    from omegaconf import open_dict
    from verl.experimental.reward_loop.reward_loop import RewardLoopManager

    with open_dict(config):
        config.reward.num_workers = 2
    scores = RewardLoopManager(config).compute_rm_score(batch).batch["rm_scores"]
    assert scores.sum(-1).tolist() == wanted_rewards(folder, batch.non_tensor_batch)


def test_a_reward_that_cannot_be_had_ends_verls_run(ray_cluster, config, rows, tokenizer):
    import copy

    from omegaconf import open_dict
    from verl.experimental.reward_loop.reward_loop import RewardLoopWorker

    dead = copy.deepcopy(config)
    with open_dict(dead):
        kwargs = dead.reward.custom_reward_function.reward_kwargs
        kwargs.url, kwargs.server_deadline = "http://127.0.0.1:9", 0
    worker = ray_cluster.remote(RewardLoopWorker).remote(dead)
    batch = batch_of(rows, tokenizer)
    with pytest.raises(ray_cluster.exceptions.RayTaskError, match="no server answers"):
        ray_cluster.get(worker.compute_score_batch.remote(batch))
