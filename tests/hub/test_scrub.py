"""Manifests lose what tells of the machine."""

import pytest

from polarctl.hub.scrub import scrub_manifest


def test_a_manifest_keeps_nothing_of_this_machine():
    scrubbed = scrub_manifest(
        {
            "config": {
                "model": "/home/a/my models/base",
                "base": "org/name",
                "server": "http://10.0.0.7:8000/v1",
                "paper": "https://arxiv.org/abs/2507.05197",
                "api_key": "sk-x",
                "reward_token": "[R]",
                "data": "../x/y.jsonl",
                "shard": "0/4",
            },
            "choices": {"d": {"value": "cpu", "reason": "found in /opt/a/b on box-7; and/or"}},
            "environment": {"host": "box-7", "python": "3.11"},
        }
    )
    assert scrubbed == {
        "config": {
            "model": "base",
            "base": "org/name",
            "server": "<url>",
            "paper": "https://arxiv.org/abs/2507.05197",
            "reward_token": "[R]",
            "data": "y.jsonl",
            "shard": "0/4",
        },
        "choices": {"d": {"value": "cpu", "reason": "found in b on <host>; and/or"}},
        "environment": {"python": "3.11"},
    }


@pytest.mark.parametrize(
    ("text", "left"),
    [
        (r"\\nas-3\home\ann\models\base", "base"),
        (r"\\nas-3\home", "<path>"),
        (r"//nas-3/home/ann/base", "base"),
        (r"C:\Users\Ann Lee\my models\base", "base"),
        (r"..\ann\base", "base"),
        ("/home/ann/my models/base", "base"),
        ("~/my models/the base", "the base"),
        (r"read \\nas-3\home\ann lee\base, then go", "read base, then go"),
        (r"read C:\Users\Ann Lee\base.jsonl", "read base.jsonl"),
        ("read C:/Users/Ann Lee/base.jsonl", "read base.jsonl"),
        ("read /home/ann/my models/base, then go", "read base, then go"),
        ("read `/home/ann/my models/base`", "read `base`"),
        ("in /home/ann lee/my old models/x.jsonl:7", "in x.jsonl:7"),
        ("ann@10.0.0.7", "<host>"),
        ("ann@10.0.0.7:/home/ann/my models/base", "<host>:base"),
        ("ann@gpu-box:/data/ann/base", "base"),
        ("ssh ann.lee@box.lab.org now", "ssh <host> now"),
        ("ann@[fe80::1]:/data/ann/base", "base"),
        ("from ann@[fe80::1]:/data/ann/base", "from <host>:base"),
        ("from ann@gpu-box:/data/ann/base", "from <host>:base"),
        ("asked 10.0.0.7:8000 first", "asked <host>:8000 first"),
        ("file:///home/ann/base", "<url>"),
    ],
)
def test_paths_users_and_addresses_go_however_they_are_written(text, left):
    assert scrub_manifest({"config": {"x": text}})["config"]["x"] == left


@pytest.mark.parametrize(
    "text",
    [
        "org/name",
        "org/name@main",
        "127.0.0.1:8000",
        "0/4",
        "<|reward|>",
        r"\\boxed\{(.*?)\}".replace("\\\\", "\\"),
        r"answer: (\d+)\s*$",
        "prompt and/or reference",
        "2.13.0+cpu",
        "Be brief, and/or kind; score 3/5",
        "https://huggingface.co/org/name/tree/main",
        "a/b test w/ two arms",
        "C: drive",
    ],
)
def test_other_texts_of_a_manifest_stay(text):
    assert scrub_manifest({"config": {"x": text}})["config"]["x"] == text
