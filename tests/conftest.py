"""Fixtures that several test files share."""

import os

import pytest

# No test reaches for the network, and model libraries keep to one thread a process.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(autouse=True)
def own_choices():
    """A choice is said once in a run; what another test has said counts for none."""
    from polarctl import console

    before = console.snapshot()
    console.restore({**before, "choices": {}})
    yield
    console.restore(before)


@pytest.fixture(scope="session")
def tiny_lm(tmp_path_factory):
    """Folder of a tiny random base LM with its tokenizer."""
    from tiny import build_lm

    return build_lm(tmp_path_factory.mktemp("models") / "tiny-base", seed=1)


@pytest.fixture(scope="session")
def tiny_chat_lm(tmp_path_factory):
    """Folder of a tiny random chat LM: a chat template and another seed."""
    from tiny import build_lm

    return build_lm(tmp_path_factory.mktemp("models") / "tiny-chat", chat=True, seed=2)


@pytest.fixture(scope="session")
def tiny_rm(tiny_lm, tmp_path_factory):
    """Folder of a tiny reward model with a random, non-zero head."""
    from tiny import build_rm

    return build_rm(tmp_path_factory.mktemp("models") / "tiny-rm", tiny_lm)


def pytest_collection_modifyitems(items):
    """Tests that need a GPU are counted as skipped where there is none; nothing else is."""
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no GPU here"))
