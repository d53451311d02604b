"""What docs/guides/gsm8k.md starts from: `python docs/studies/gsm8k.py gsm8k_train.jsonl.gz`.

Reads the training part of GSM8K. Writes, in the current folder, `small` (a tokenizer and the config
of a small model) and `made.jsonl` (triples made from solutions that no one has ranked).
"""

import argparse
import gzip
import json
import random
import re


def small(texts):
    """A tokenizer, in which a number is one piece with or without a space before it; a config."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen3Config

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=3000,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|end|>", pad_token="<|end|>"
    )
    tokenizer.save_pretrained("small")
    Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=16,
        max_position_embeddings=2048,
        initializer_range=0.08,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    ).save_pretrained("small")


def made(rows):
    """Triples: the solution, the same less a line, and that with another final result."""
    draw = random.Random(0)
    answers = [row["answer"].rpartition("#### ")[2] for row in rows]
    for row, answer in zip(rows, answers, strict=True):
        steps = row["answer"].split("\n")[:-1]
        wrong = draw.choice([other for other in draw.sample(answers, 9) if other != answer])
        kept = steps[:]
        kept.pop(draw.randrange(len(kept)))  # a chosen answer that is no copy
        chosen = "\n".join([*kept, f"A: {answer}"])
        rejected = re.sub(rf"(?<![\d.,]){re.escape(answer)}(?![\d,])", wrong, chosen)
        reference = "\n".join([*steps, f"A: {answer}"])
        yield {
            "prompt": row["question"],
            "reference": reference,
            "chosen": chosen,
            "rejected": rejected,
        }


def main():
    """Write all of it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("train", help="train.jsonl of GSM8K, or its .gz")
    path = parser.parse_args().train
    with (gzip.open if path.endswith(".gz") else open)(path, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    small(row["question"] + "\n" + row["answer"] for row in rows)
    with open("made.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(triple) + "\n" for triple in made(rows))


if __name__ == "__main__":
    main()
