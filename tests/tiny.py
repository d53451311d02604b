"""Tiny random models and tokenizers, made offline: import the builders, or use the fixtures."""

from pathlib import Path

TEXT = """The sea was calm that day. The boats lay still, and nobody spoke of the storm.
What is the sum of 3 and 4? The sum is 7. What is the capital of France? It is Paris.
def add(a, b): return a + b  # 12 + 30 = 42. Do not panic! Why not? Because it helps.
"""
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def with_options(base: list[str], more: list[str] | tuple[str, ...]) -> list[str]:
    """A command with other options, which replace those that it has: none may be given twice."""
    kept: list[str] = []
    words = iter(base)
    for word in words:
        if not (word.startswith("-") and word in more):
            kept.append(word)
        elif word != "-q":
            next(words)  # its value
    return [*kept, *more]


def build_tokenizer(*, chat: bool = False, vocab_size: int = 320):
    """A byte-level BPE tokenizer: any text goes there and back."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    special = ["<|end|>", "<|user|>", "<|assistant|>"]
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        [TEXT], vocab_size=vocab_size, special_tokens=special, show_progress=False
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, eos_token="<|end|>", pad_token="<|end|>"
    )
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_lm(
    folder: Path,
    *,
    chat: bool = False,
    seed: int = 0,
    context: int = 128,
    hidden_size: int = 32,
    layers: int = 2,
    sharpness: float = 0.4,
) -> Path:
    """A folder with a random Llama and its tokenizer.

    Args:
        folder: Where to write.
        chat: Give the tokenizer a chat template.
        seed: Seed of the weights: another seed, another policy.
        context: `max_position_embeddings`.
        hidden_size: Width.
        layers: Number of layers.
        sharpness: Scale of the weights; larger makes the next token more certain.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = build_tokenizer(chat=chat)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
        initializer_range=sharpness,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Path(folder)


def build_rm(folder, base):
    """A folder with a POLAR model: the weights of a causal LM and a random, non-zero head."""
    import torch

    from polarctl.model import reward_model

    made = reward_model.create(base=str(base))
    torch.nn.init.normal_(made.model.score.weight, generator=torch.Generator().manual_seed(3))
    made.save(folder)
    return folder


def build_chat_rm(folder, *, labels=1, chat=True, context=128, pad=None, **config):
    """A folder with a random Llama classifier, as baselines are published."""
    import torch
    from transformers import LlamaConfig, LlamaForSequenceClassification

    tokenizer = build_tokenizer(chat=chat)
    if pad:
        tokenizer.add_special_tokens({"pad_token": pad})
    torch.manual_seed(7)
    model = LlamaForSequenceClassification(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=context,
            initializer_range=0.4,
            num_labels=labels,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **config,
        )
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
