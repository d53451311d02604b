"""One or two examples of every kind of record: shown by the schemas, used as test fixtures."""

from __future__ import annotations

from typing import Any

_QUESTION = "What is the capital of France?"

EXAMPLES: dict[str, list[dict[str, Any]]] = {
    "prompt": [
        {"prompt": _QUESTION, "reference": "Paris."},
        {
            "id": "geo-1",
            "prompt": [{"role": "user", "content": _QUESTION}],
            "wrapper": "sft",
            "category": "geography",
        },
    ],
    "trajectory": [
        {
            "id": "geo-1",
            "prompt": _QUESTION,
            "output": "The capital is Paris.",
            "policy": "small-sft",
            "sample": 0,
            "wrapper": "sft",
            "finish_reason": "stop",
            "cleaned": [],
            "num_tokens": 6,
        }
    ],
    "triple": [
        {
            "prompt": _QUESTION,
            "reference": "Paris.",
            "chosen": "The capital is Paris.",
            "rejected": "The capital is Lyon.",
        },
        {
            "id": "text-7",
            "prompt": "The sea was",
            "reference": " calm that day.",
            "chosen": " calm and grey.",
            "rejected": " Sea sea sea.",
            "wrapper": "pretrain",
            "reference_policy": "base-large",
            "policy": "base-large",
            "rejected_policy": "base-small",
        },
    ],
    "candidate": [
        {"prompt": _QUESTION, "reference": "Paris.", "output": "It is Paris."},
        {
            "prompt": _QUESTION,
            "reference": "Paris.",
            "candidates": [
                {"name": "a", "output": "It is Paris.", "label": 1},
                {"name": "b", "output": "It is Rome.", "label": 0},
            ],
        },
    ],
    "score": [
        {"prompt": _QUESTION, "reference": "Paris.", "output": "It is Paris.", "reward": 0.41},
        {
            "prompt": _QUESTION,
            "reference": "Paris.",
            "candidates": [{"output": "It is Paris."}, {"output": "It is Rome."}],
            "rewards": [0.41, -2.3],
            "best": 0,
        },
    ],
    "verdict": [
        {
            "id": "geo-1",
            "correct": True,
            "margin": 2.71,
            "rewards": [0.41, -2.3],
            "baselines": {"length": 1.0, "overlap": 1.0},
            "category": "geography",
            "better": "a",
            "worse": "b",
        }
    ],
    "report": [
        {
            "metric": "preference accuracy",
            "overall": {"model": {"value": 0.9, "low": 0.85, "high": 0.94, "n": 200}},
            "categories": {},
            "margins": {"min": -1.0, "p25": 0.2, "p50": 0.9, "p75": 1.8, "max": 4.0},
            "skipped": {},
        }
    ],
    "manifest": [
        {
            "schema_version": 1,
            "stage": "pair",
            "version": "0.1.0",
            "config": {"seed": 0},
            "inputs": [{"path": "trajectories.jsonl", "bytes": 1024}],
            "outputs": {
                "triples.jsonl": {
                    "sha256": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
                    "bytes": 0,
                    "path": "triples.jsonl",
                    "records": 0,
                }
            },
            "counts": {"records": 0, "rejects": 0},
            "choices": {},
            "environment": {"python": "3.11.7"},
        }
    ],
    "pool": [
        {"policy": "base-large", "model": "models/base-large", "kind": "base"},
        {"policy": "small-sft", "model": "models/small-sft", "temperature": 0.8, "samples": 4},
        {
            "policy": "hosted",
            "model": "large-instruct",
            "kind": "chat",
            "backend": "openai",
            "url": "http://127.0.0.1:8000",
        },
    ],
}
