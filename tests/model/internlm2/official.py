"""Tiny random checkpoints in the format in which POLAR's were published (InternLM2)."""

import io
import json
from functools import cache
from pathlib import Path

REWARD = "[UNUSED_TOKEN_130]"
UNUSED = [f"[UNUSED_TOKEN_{n}]" for n in (1, 2, 13, 130)]
TEXT = """The sea was calm that day. The boats lay still, and nobody spoke of the storm.
What is the sum of 3 and 4? The sum is 7. What is the capital of France? It is Paris.
def add(a, b):\n    return a + b  # 12 + 30 = 42. Do not panic! Why not? Because it helps.
the theme of the thesis is the thing that they think, the sun and the sand and the land
海很平静，船静静地停着，没有人谈论风暴。海风，海浪，海上的船。
"""
CODE = """import pathlib
pathlib.Path({canary!r}).write_text("ran")
class InternLM2Config: pass
class InternLM2ForRewardModel: pass
class InternLM2Tokenizer: pass
class InternLM2TokenizerFast: pass
"""


@cache
def sentencepiece_model() -> bytes:
    """A BPE model like InternLM2's: bytes as fallback, nothing normalised, reserved tokens."""
    import sentencepiece

    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines() * 3),
        model_writer=written,
        model_type="bpe",
        vocab_size=440,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        user_defined_symbols=UNUSED,
        num_threads=1,
        minloglevel=2,
    )
    return written.getvalue()


def write_tokenizer(folder: Path, kind: str, *, added: bool = True) -> dict:
    """Write a tokenizer as the published folders have it.

    Args:
        folder: Where to.
        kind: "model" for tokenizer.model alone, "json" for tokenizer.json alone.
        added: Whether tokenizer_config.json lists the reward token, and a chat token in the place
            of `[UNUSED_TOKEN_2]`.

    Returns:
        What config.json says of it: sizes and ids.
    """
    special = ["<unk>", "<s>", "</s>"]
    if kind == "model":
        import sentencepiece

        (folder / "tokenizer.model").write_bytes(sentencepiece_model())
        processor = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model())
        size, reward = processor.get_piece_size(), processor.piece_to_id(REWARD)
        tokens = dict(enumerate(special))
        if added:
            tokens |= {reward: REWARD, processor.piece_to_id(UNUSED[1]): "<|im_start|>"}
    else:
        from tiny import build_tokenizer

        core = build_tokenizer().backend_tokenizer
        core.add_special_tokens([*special, REWARD])
        core.save(str(folder / "tokenizer.json"))
        size, reward = core.get_vocab_size(), core.token_to_id(REWARD)
        tokens = {core.token_to_id(token): token for token in [*special, REWARD]}
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    settings = {
        "added_tokens_decoder": {
            str(index): {"content": token, **flags, "special": True}
            for index, token in tokens.items()
        },
        "auto_map": {
            "AutoTokenizer": [
                "tokenization_internlm2.InternLM2Tokenizer",
                "tokenization_internlm2_fast.InternLM2TokenizerFast",
            ]
        },
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "</s>",
        "unk_token": "<unk>",
        "tokenizer_class": "InternLM2Tokenizer",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    ids = {token: index for index, token in tokens.items()}
    return {
        "vocab_size": size,
        "reward_token_id": reward,
        "bos_token_id": ids["<s>"],
        "eos_token_id": ids["</s>"],
        "pad_token_id": ids["</s>"],
    }


def weights(config: dict, *, seed: int = 0) -> dict:
    """Random weights by their published names; a causal LM has `output` for the head."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    heads, kv = config["num_attention_heads"], config["num_key_value_heads"]
    dim = hidden // heads
    dtype = getattr(torch, config["torch_dtype"])

    def random(*shape, scale=0.3 * (32 / hidden) ** 0.5):
        return (torch.randn(*shape, generator=generator) * scale).to(dtype)

    found = {"model.tok_embeddings.weight": random(config["vocab_size"], hidden, scale=1.0)}
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        found[at + "attention.wqkv.weight"] = random((heads + 2 * kv) * dim, hidden)
        found[at + "attention.wo.weight"] = random(hidden, hidden)
        if config["bias"]:
            found[at + "attention.wqkv.bias"] = random((heads + 2 * kv) * dim)
            found[at + "attention.wo.bias"] = random(hidden)
        found[at + "feed_forward.w1.weight"] = random(ffn, hidden)
        found[at + "feed_forward.w3.weight"] = random(ffn, hidden)
        found[at + "feed_forward.w2.weight"] = random(hidden, ffn)
        found[at + "attention_norm.weight"] = 1 + random(hidden)
        found[at + "ffn_norm.weight"] = 1 + random(hidden)
    found["model.norm.weight"] = 1 + random(hidden)
    if config["architectures"] == ["InternLM2ForRewardModel"]:
        found["v_head.weight"] = random(1, hidden)
    else:
        found["output.weight"] = random(config["vocab_size"], hidden)
    return found


def write_weights(folder: Path, tensors: dict, *, format: str, sharded: bool) -> None:
    """Write weights as `.bin` or `.safetensors`, in one file or in two with an index."""
    import torch
    from safetensors.torch import save_file

    stem, end = {"bin": ("pytorch_model", ".bin"), "safetensors": ("model", ".safetensors")}[format]

    def write(part, name):
        if format == "bin":
            torch.save(part, folder / name)
        else:
            save_file(part, folder / name, metadata={"format": "pt"})

    if not sharded:
        write(tensors, stem + end)
        return
    names = list(tensors)
    middle = len(names) // 2
    index = {}
    for number, part in enumerate((names[:middle], names[middle:]), 1):
        file = f"{stem}-{number:05}-of-00002{end}"
        write({name: tensors[name] for name in part}, file)
        index |= dict.fromkeys(part, file)
    content = {"metadata": {"total_size": 0}, "weight_map": index}
    (folder / f"{stem}{end}.index.json").write_text(json.dumps(content))


def build_official(
    folder: Path,
    *,
    format: str = "safetensors",
    sharded: bool = False,
    tokenizer: str = "json",
    added: bool = True,
    architecture: str = "InternLM2ForRewardModel",
    bias: bool = False,
    dtype: str = "float32",
    hidden: int = 32,
    max_positions: int = 64,
    scaling: dict | None = None,
    canary: Path | None = None,
    seed: int = 0,
) -> Path:
    """A folder in the published format with a tiny random model.

    Args:
        folder: Where to write; made if needed.
        format: "bin" or "safetensors".
        sharded: Two weight files with an index instead of one.
        tokenizer: "json" for tokenizer.json, "model" for sentencepiece's tokenizer.model.
        added: See `write_tokenizer`.
        architecture: That of a reward model or of a causal LM.
        bias: Whether attention has biases.
        dtype: Precision in the files.
        hidden: Width.
        max_positions: `max_position_embeddings`.
        scaling: `rope_scaling`; default: dynamic with factor 2, as published.
        canary: Also write the code files that `auto_map` names; run, they would make this file.
        seed: Seed of the weights.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    ids = write_tokenizer(folder, tokenizer, added=added)
    kind = "AutoModelForCausalLM" if "Causal" in architecture else "AutoModel"
    config = {
        "architectures": [architecture],
        "auto_map": {
            "AutoConfig": "configuration_internlm2.InternLM2Config",
            kind: f"modeling_internlm2.{architecture}",
        },
        "attn_implementation": "eager",
        "bias": bias,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": 3 * hidden // 2,
        "max_position_embeddings": max_positions,
        "model_type": "internlm2",
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-05,
        "rope_scaling": scaling or {"factor": 2.0, "type": "dynamic"},
        "rope_theta": 10000,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        "use_cache": False,
        **ids,
    }
    if "Reward" not in architecture:
        del config["reward_token_id"]
    (folder / "config.json").write_text(json.dumps(config))
    write_weights(folder, weights(config, seed=seed), format=format, sharded=sharded)
    if canary is not None:
        for name in ("modeling", "configuration", "tokenization"):
            code = CODE.format(canary=str(canary))
            (folder / f"{name}_internlm2.py").write_text(code)
        (folder / "tokenization_internlm2_fast.py").write_text(code)
    return folder
