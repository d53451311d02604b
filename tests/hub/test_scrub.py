"""Manifests lose what tells of the machine."""

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
