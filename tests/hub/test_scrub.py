"""Secrets are found, and manifests lose what tells of the machine."""

import io

import pytest

from polarctl.hub.scrub import environment_secrets, find_secrets, scrub_manifest

SECRET = "hf_" + "Zq8" * 11


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("sk-proj-" + "aB3dE" * 10, True),
        ("sk-" + "a1" * 24, True),
        ("AKIA" + "Q7" * 8, True),
        ("-----BEGIN OPENSSH PRIVATE KEY-----\\nb3Bl", True),
        ("ghp_" + "a1B2" * 9, True),
        ("hf_hub_download(repo_id)", False),
        ("https://example.org/sk-how-to-write-a-very-long-slug-in-2024", False),
        ("task-1234567890123456789012", False),
        ("AKIAIOSFODNN7EXAMPLE", False),
    ],
)
def test_what_looks_like_a_secret(text, found):
    assert bool(list(find_secrets(io.BytesIO(f'["{text}"]'.encode()), {}))) is found


def test_a_secret_across_two_blocks_is_found_once_with_its_line(monkeypatch):
    monkeypatch.setattr("polarctl.hub.scrub._BLOCK_BYTES", 64)
    monkeypatch.setattr("polarctl.hub.scrub._OVERLAP_BYTES", 64)
    for before in range(40, 80):
        text = "\n" * before + SECRET + "\n" * 100
        places = list(find_secrets(io.BytesIO(text.encode()), {}))
        assert places == [(before + 1, "a Hugging Face token")]


def test_secrets_of_the_environment_are_told_by_their_names():
    found = environment_secrets(
        {"A_TOKEN": "x" * 12, "B_KEY": "short", "PATH": "y" * 20, "C_SECRET": "/run/secrets/file"}
    )
    assert found == {"the value of $A_TOKEN": b"x" * 12}


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
