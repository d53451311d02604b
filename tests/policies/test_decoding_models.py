"""Decoding of every type of causal LM: what is written is what each text alone would become."""

import numpy as np
import pytest
import torch
import transformers
from causal_lms import build
from tiny import build_tokenizer

from polarctl.cli import run
from polarctl.policies.decoding import draw, generate, reading_of
from polarctl.policies.pool import Sampling
from polarctl.policies.uniforms import uniforms

PROMPTS = [[5, 9, 17], [30], [5, 9, 17], list(range(40, 57)), [7, 7], [80, 81, 82, 83], [30]]
LIMITS = [12, 3, 12, 7, 1, 12, 12]
STOP = [11, 25]
SAMPLING = Sampling(max_new_tokens=12)
# Kept in a cache or read whole, these give other logits in transformers itself: positions that
# follow the padding token, windows that only the one of both ways has, a chunked state.
CACHE_DIFFERS = {"bamba", "moshi", "prophetnet", "nemotron_h"} | {
    "camembert",
    "data2vec-text",
    "roberta",
    "xlm-roberta",
}


def alone(model, prompt, seed, limit, cache=None):
    """One text by itself: read whole for every token, or with the cache of that name."""
    ids, past = list(prompt), None
    for step in range(limit):
        given = {"input_ids": torch.tensor([ids])}
        if cache is not None:
            new = ids if past is None else ids[-1:]
            given = {"input_ids": torch.tensor([new]), cache: past, "use_cache": True}
        with torch.inference_mode():
            out = model(**given)
        past = getattr(out, cache) if cache is not None else None
        number = uniforms(np.array([seed], dtype=np.uint64), step)
        token = int(draw(out.logits[:, -1], number, SAMPLING)[0])
        if token in STOP:
            return ids[len(prompt) :], True
        ids.append(token)
    return ids[len(prompt) :], False


def both(model, cache=None):
    """What is wanted, and what there is."""
    wanted = [
        alone(model, prompt, seed, limit, cache)
        for seed, (prompt, limit) in enumerate(zip(PROMPTS, LIMITS, strict=True))
    ]
    made = generate(model, PROMPTS, range(7), LIMITS, sampling=SAMPLING, stop=STOP, batch_size=4)
    return wanted, made


@pytest.mark.parametrize(
    ("name", "cache", "padded"),
    [
        ("lfm2", "past_key_values", False),
        ("qwen3_5_text", "past_key_values", False),
        ("falcon_h1", "past_key_values", False),
        ("granitemoehybrid", "past_key_values", False),
        ("mamba", "cache_params", False),
        ("mamba2", "cache_params", False),
        ("bloom", "past_key_values", False),
        ("openai-gpt", None, False),
        ("gpt_oss", "past_key_values", True),
    ],
)
def test_a_batch_is_what_each_text_alone_would_become(name, cache, padded):
    model = build(name)
    reading = reading_of(model)
    assert (reading.cache, reading.padded) == (cache, padded)
    wanted, made = both(model)
    assert made == wanted
    assert len({tuple(tokens) for tokens, _ in made}) > 4  # not the same for all


@pytest.mark.slow
def test_every_type_that_can_be_built_is_read_right():
    """Types that are not built need packages or pictures, or do not shrink by these names."""
    names = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    read, wrong = [], {}
    for name in names:
        try:
            model = build(name)
            alone(model, PROMPTS[0], 0, 2)
        except Exception:
            continue
        read.append(name)
        try:
            cache = reading_of(model).cache if name in CACHE_DIFFERS else None
            wanted, made = both(model, cache)
            if made != wanted:
                wrong[name] = "differs"
        except Exception as error:
            wrong[name] = f"{type(error).__name__}: {error}"
    assert wrong == {}
    assert len(read) >= 110, read


def test_sample_writes_with_a_recurrent_policy_and_refuses_what_reads_no_text(tmp_path, capfd):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt":"Why?"}\n{"prompt":"What is it that they say?"}\n')
    for name in ("mamba", "xmod"):  # xmod asks for a language, which nobody has set
        build(name).save_pretrained(tmp_path / name)
        build_tokenizer().save_pretrained(tmp_path / name)
    arguments = [
        "sample",
        str(prompts),
        "--samples",
        "3",
        "--max-new-tokens",
        "8",
        "--no-clean",
        "-o",
    ]
    out = str(tmp_path / "out.jsonl")
    assert run([*arguments, out, "-m", str(tmp_path / "mamba")]) == 0
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 6
    assert "batches: of one length (`mamba` has recurrent layers)" in capfd.readouterr().err
    assert run([*arguments, str(tmp_path / "no.jsonl"), "-m", str(tmp_path / "xmod")]) == 4
    said = capfd.readouterr().err
    assert "xmod: the model does not continue a text (ValueError: " in said
    assert "Traceback" not in said
