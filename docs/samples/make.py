"""Make the sample files of docs/guides/your-data.md: `python docs/samples/make.py`.

A bicycle workshop answers questions. `pairs.csv` is what somebody there could export: a question,
the answer in the workshop's handbook, and two drafts of which a colleague preferred one.
`answers.csv` holds new drafts that nobody has judged. `base` is a config of a small model with a
tokenizer of these words, for random weights.
"""

import csv
import random
from pathlib import Path

HERE = Path(__file__).parent
BIKES = ["city bike", "road bike", "cargo bike", "e-bike", "child's bike", "tandem", "gravel bike"]
JOBS = ["brake check", "chain change", "wheel truing", "full service", "gear adjustment"]
JOBS += ["tyre change", "light repair", "bearing service", "saddle fitting", "frame cleaning"]
ASKED = {
    "minutes": ("How long does a {job} take for my {bike}?", [15, 20, 25, 30, 40, 45, 50, 60, 75]),
    "euros": ("What does a {job} cost for my {bike}?", [9, 14, 19, 24, 29, 35, 39, 45, 55, 65]),
    "days": ("How many days is my {bike} away for a {job}?", [2, 3, 4, 5, 6, 7]),
}
GOOD = [
    "That is {n} {unit}. You are welcome any day.",
    "We plan {n} {unit}. Shall I book you in?",
    "{n} {unit}. Just come to the counter.",
    "The {job} is {n} {unit}, with a short ride to try it.",
]
# Evasive answers repeat the question's words.
VAGUE = [
    "{job}, {bike}: hard to say.",
    "A {job} for a {bike}? It depends on the {bike}.",
    "Every {bike} is different, so nobody can tell for a {job}.",
    "Ask my colleague about the {job} of a {bike}.",
]
CUT = ["For the {job} of your {bike} we", "The {job} of a {bike} is", "{job}, {bike}: that is"]


def drafts(draw, unit, numbers, names):
    """The handbook's answer, a good draft, a bad one, and what is wrong with it."""
    n = draw.choice(numbers)
    reference = "{job}, {bike}: {n} {unit}.".format(n=n, unit=unit, **names)
    good = draw.choice(GOOD).format(n=n, unit=unit, **names)
    kind = draw.choice(["vague", "vague", "cut off", "wrong number"])
    if kind == "wrong number":
        other = draw.choice([one for one in numbers if one != n])
        return reference, good, draw.choice(GOOD).format(n=other, unit=unit, **names), kind
    return reference, good, draw.choice(VAGUE if kind == "vague" else CUT).format(**names), kind


def write(name, rows):
    """A CSV file with a header."""
    with open(HERE / name, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def base(texts):
    """A tokenizer of the samples' words and the config of a small model."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|end|>", "<|pad|>", "<|user|>", "<|assistant|>"]
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=600, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        ),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|end|>", pad_token="<|pad|>"
    )
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    )
    tokenizer.save_pretrained(HERE / "base")
    LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        initializer_range=0.08,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    ).save_pretrained(HERE / "base")


def main():
    """Write all files."""
    draw = random.Random(0)
    asked = [(unit, job, bike) for unit in ASKED for job in JOBS for bike in BIKES]
    draw.shuffle(asked)
    pairs, answers = [], []
    for number, (unit, job, bike) in enumerate(asked):
        question, numbers = ASKED[unit]
        names = {"job": job, "bike": bike}
        reference, good, bad, kind = drafts(draw, unit, numbers, names)
        row = {"question": question.format(**names), "handbook": reference}
        if number >= 10:
            pairs.append({**row, "preferred": good, "other": bad, "category": kind})
        else:
            answers += [{**row, "draft": text} for text in draw.sample([good, bad], 2)]
    write("pairs.csv", pairs)
    write("answers.csv", answers)
    base(value for row in pairs for value in row.values())


if __name__ == "__main__":
    main()
