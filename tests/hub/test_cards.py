"""The cards of what is published."""

import re

import yaml

from polarctl.hub import cards


def front_matter(card):
    return yaml.safe_load(card.split("---\n")[1])


def test_the_snippet_of_the_card_builds_the_template():
    card = cards.model_card(
        "me/rm", {"polar": {"separator": "<s>", "reward_token": "[R]"}}, None, {}
    )
    code = card.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")
    lines = [line for line in code.splitlines() if re.match(r"\w[\w, ]* = [^A]", line)]
    scope = {"tokenizer": lambda text, return_tensors: None}
    exec("\n".join(lines), scope)
    question = "What is the capital of France?"
    assert scope["text"] == f"{question}\nParis.<s>{question}\nThe capital is Paris.[R]"


def test_a_policy_gets_the_card_of_a_language_model_and_a_hub_model_is_named_as_its_base():
    manifest = {"stage": "rft", "config": {"model": "me/rm", "policy": "org/base"}}
    card = cards.model_card("me/p", {"architectures": ["LlamaForCausalLM"]}, manifest, {})
    front = front_matter(card)
    assert (front["pipeline_tag"], front["base_model"]) == ("text-generation", "org/base")


def test_size_categories_are_the_hubs():
    assert [cards.size_category(n) for n in (0, 999, 1000, 10**6, 10**9)] == [
        "n<1K", "n<1K", "1K<n<10K", "1M<n<10M", "n>1B",
    ]  # fmt: skip
