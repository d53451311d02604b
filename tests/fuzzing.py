"""Damaged and random input for the stages: made from a seed, and run in one process.

    python tests/fuzzing.py STAGE SEED FIRST COUNT [MODEL]

runs the cases from FIRST on and prints a JSON line for each that failed, then one of totals. Every
case depends on the seed, the stage and its number alone. `--show` prints a case's input instead.
"""

import csv
import gzip
import io
import json
import math
import os
import random
import re
import resource
import sys
import tempfile
import traceback
from collections import Counter
from pathlib import Path

import pyarrow
import zstandard
from pyarrow import parquet

GROWTH = 512 << 20  # bytes that a process may take beyond those after its first cases
WARM = 8
LONGEST_MESSAGE = 2000
# What is said of an input as a whole: none of its rows is at fault.
OF_ALL = re.compile(
    r"records are bad|nothing to compare in|no triple could be made from|no answers to rate"
    r"|no record has (a margin|the id)|no item in common"
)

TEXTS = (
    ["", " ", "\n", "a", "é", "\u2028", "\x00", "\ud800", "😀", "0", "null", "\\", '"', "x" * 5000]
    + ["<|reward|>", "[UNUSED_TOKEN_130]", "</s>", "<|end|>", "<|user|>", "[/INST]", "a\r\nb"]
    + ["../../etc/passwd", "$HOME", "{{ 7*7 }}", "%s%n", "\x1b[31m", "\u202e", "NaN", "-0"]
)
VALUES = (
    [None, True, False, 0, 1, -1, 2**31, 2**53 + 1, 2**63 - 1, 2**64 - 1, -(2**63), 0.5, -0.0]
    + [1e-320, 1e308, -1e308, [], {}, [[]], [None], [1], ["a"], [{}], {"a": 1}, {"role": "user"}]
    + [[{"role": "user", "content": "hi"}], [{"role": "user", "content": None}]]
    + [[{"role": 1, "content": "hi"}], [{"role": "user", "content": [{"type": "text"}]}]]
    + [[{"role": "user", "content": [{"type": "text", "text": "hi"}]}], [{"from": "human"}]]
)
# What JSON text may hold that Python's own `json.dumps` would not write.
RAW = ["1e400", "NaN", "-Infinity", "9" * 30, "9" * 5000, '"\\ud800"', "[" * 200 + "]" * 200]

CELLS = [
    "",
    "null",
    "true",
    "7",
    "1e999",
    "{}",
    "[{",
    '[{"role": "user"}]',
    "\x00",
    '"',
    "9" * 5000,
]

PAIR = {"prompt": "Who?", "reference": "me", "chosen": "it is me", "rejected": "you"}
TEMPLATES = {
    "triple": [PAIR, {**PAIR, "wrapper": "pretrain", "negatives": ["he", "she"], "margin": 0.5}],
    "candidate": [
        {"prompt": "Who?", "reference": "me", "output": "it is me"},
        {"prompt": "Who?", "references": ["me", "I"], "output": "it is me"},
        {
            "prompt": [{"role": "user", "content": "Who?"}],
            "reference": "me",
            "candidates": [{"output": "me", "label": 1}, {"name": "b", "output": "you"}],
        },
    ],
    "prompt": [{"prompt": "Who?", "id": "1"}, {"prompt": [{"role": "user", "content": "Who?"}]}],
    "answered": [{"prompt": "Who?", "reference": "me"}, {"prompt": "Why?", "reference": " so"}],
    "scored": [
        {**PAIR, "rewards": [0.5, -1.5], "category": "easy"},
        {
            "prompt": "Who?",
            "candidates": [{"output": "a", "label": 1}, {"output": "b", "label": 0}],
            "rewards": [1.0, 2.0],
            "best": 1,
        },
    ],
    "rated": [
        {"prompt": "Who?", "policy": "a", "output": "me", "label": 1},
        {"prompt": "Who?", "policy": "b", "output": "you", "label": 0, "reward": 0.5},
        {"prompt": "Who?", "policy": "a", "output": "I", "accept": ["I", "me"], "sample": 1},
        {
            "prompt": "Who?",
            "candidates": [{"name": "a", "output": "I"}, {"name": "b", "output": "you"}],
            "accept": ["I"],
            "rewards": [1.5, -0.5],
        },
    ],
    "foreign": [
        {"prompt": "Who?", "chosen": "me", "rejected": "you"},
        {"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "I"}]},
        {"conversations": [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "I"}]},
        {"context": "Who?", "completions": [{"rank": 1, "completion": "me"}]},
        {"instruction": "Who?", "input": "", "chosen": "me", "rejected": "you"},
        {"question": "1+1?", "answer": "2\n#### 2"},
        {"prompt": "Who?", "response_0": "a", "response_1": "b", "better_response_id": 0},
        {"prompt": "Who?", "answers": [{"answer": "a", "model": "m", "rank": 1}]},
        {"prompt": "Who?", "response": "me", "helpfulness": 3},
        {"instruction": "Who?", "completions": [{"response": "a", "fine-grained_score": 2}]},
        {"conversation_a": [{"role": "user", "content": "Who?"}], "winner": "model_a"},
    ],
}
TARGETS = ["native", "triples", "candidates", "prompts", "trl", "openai", "sharegpt", "nemo"]


def trajectories(draw):
    for policy in ("a", "b", "c"):
        for sample in range(2):
            text = draw.choice(["one", "two", "three"]) + policy
            yield {"prompt": "Who?", "output": text, "policy": policy, "sample": sample}


def rows_of(stage, draw):
    """Valid rows of what a stage reads."""
    if stage == "pair":
        return list(trajectories(draw))
    kinds = {
        "validate": [*TEMPLATES],
        "convert": ["foreign", "foreign", "triple", "candidate", "scored"],
        "eval": ["scored"],
        "compare": ["scored"],
        "rate": ["rated", "rated", "candidate", "scored"],
        "show": [*TEMPLATES],
        "score": ["triple", "candidate"],
        "sample": ["prompt"],
        "rft": ["answered"],
        "pretrain": ["triple"],
        "finetune": ["triple"],
    }[stage]
    rows = TEMPLATES[draw.choice(kinds)]
    return [draw.choice(rows) for _ in range(draw.randint(1, 6))]


def random_value(draw, levels=3):
    kind = draw.random()
    if kind < 0.4:
        return draw.choice(TEXTS)
    if kind < 0.8 or not levels:
        return draw.choice(VALUES)
    if kind < 0.9:
        return [random_value(draw, levels - 1) for _ in range(draw.randint(0, 3))]
    return {draw.choice(TEXTS): random_value(draw, levels - 1) for _ in range(draw.randint(0, 3))}


def damaged(value, draw):
    """A value in which one place is another: a field that is missing, new or of another type."""
    if isinstance(value, dict) and value:
        found, key = dict(value), draw.choice([*value])
        way = draw.random()
        if way < 0.2:
            del found[key]
        elif way < 0.3:
            found[draw.choice([*TEXTS, "rewards", "candidates", "id", "policy"])] = random_value(
                draw
            )
        elif way < 0.6:
            found[key] = damaged(found[key], draw)
        else:
            found[key] = random_value(draw)
        return found
    if isinstance(value, list) and value and draw.random() < 0.7:
        place = draw.randrange(len(value))
        way = draw.random()
        if way < 0.2:
            return value[:place] + value[place + 1 :]
        if way < 0.4:
            return [*value, value[place]]
        return [*value[:place], damaged(value[place], draw), *value[place + 1 :]]
    if isinstance(value, str) and draw.random() < 0.5:
        return value + draw.choice(TEXTS)
    return random_value(draw)


def text_of(row, draw):
    """A line of JSON; now and then with what only text can say."""
    line = json.dumps(row, ensure_ascii=draw.random() < 0.5)
    way = draw.random()
    if way < 0.04:
        line = re.sub(r'"[^"]*"(?=[,}])', lambda _: draw.choice(RAW), line, count=1)
    elif way < 0.06:
        line = line[:-1] + ', "prompt": "again"}'
    data = line.encode("utf-8", "surrogatepass")
    if way > 0.96:
        place = draw.randrange(len(data))
        data = (
            data[:place] + draw.choice([b"", b"\xff", b"\x00", b"\r", data[:5]]) + data[place + 1 :]
        )
    return data


def table_of(rows, draw):
    """Rows as one JSON array, as CSV or as Parquet, and the ending of the file's name."""
    way = draw.random()
    if way < 0.5:
        comma = draw.choice([b","] * 6 + [b",\n", b"", b",,"])
        data = b"[" + comma.join(text_of(row, draw) for row in rows) + b"]"
        if draw.random() < 0.1:
            levels = draw.choice([100, 130, 2000, 100_000])
            data = data[:-1] + comma + b"[" * levels + b"]" * levels + b"]"
        return data, ".json"
    rows = [row if isinstance(row, dict) else {"prompt": row} for row in rows]
    if way < 0.8:
        names = draw.sample([*rows[0], "label", "prompt"], k=draw.randint(1, 2))
        text = io.StringIO()
        writer = csv.writer(text)
        writer.writerow(names)
        for row in rows:
            cells = (row.get(name, draw.choice(CELLS)) for name in names)
            cells = (cell if isinstance(cell, str) else json.dumps(cell) for cell in cells)
            writer.writerow(draw.choice([*cells, ""] if draw.random() < 0.05 else [[*cells]]))
        return text.getvalue().encode("utf-8", "surrogatepass"), ".csv"
    texts = {name: [json.dumps(row.get(name)) for row in rows] for name in rows[0]}
    sink = io.BytesIO()
    parquet.write_table(pyarrow.table(texts), sink)
    data = bytearray(sink.getvalue())
    for _ in range(draw.choice([0, 0, 1, 3])):
        data[draw.randrange(4, len(data))] ^= 1 << draw.randrange(8)
    return bytes(data), ".parquet"


def make(stage, seed, number):
    """The bytes of a case and the ending of its file's name."""
    draw = random.Random(f"{seed} {stage} {number}")
    if stage == "tables":
        rows = rows_of("convert", draw)
        for _ in range(draw.choice([0, 1, 1, 2])):
            place = draw.randrange(len(rows))
            rows[place] = damaged(rows[place], draw)
        data, suffix = table_of(rows, draw)
        if draw.random() < 0.1:
            data = data[: draw.randint(0, len(data))]
        return data, suffix, draw
    kind = draw.random()
    if kind < 0.1:
        data = draw.randbytes(draw.randint(0, 200))
    elif kind < 0.2:
        values = [random_value(draw) for _ in range(draw.randint(1, 5))]
        data = b"\n".join(text_of(value, draw) for value in values)
    else:
        rows = rows_of(stage, draw)
        for _ in range(draw.choice([0, 1, 1, 1, 2, 4])):
            place = draw.randrange(len(rows))
            rows[place] = damaged(rows[place], draw)
        end = draw.choice([b"\n"] * 8 + [b"\r\n", b"\n\n", b"\n \t\n"])
        data = end.join(text_of(row, draw) for row in rows)
        data += draw.choice([end] * 4 + [b""])
    way = draw.random()
    if way < 0.02:
        data = b"\xef\xbb\xbf" + data
    elif way < 0.03:
        data = data.decode("utf-8", "replace").encode("utf-16")
    elif way < 0.05:
        data = data[: draw.randint(0, len(data))]
    suffix = draw.choice([""] * 8 + [".gz", ".zst"])
    if suffix:
        data = gzip.compress(data, mtime=0) if suffix == ".gz" else zstandard.compress(data)
        if draw.random() < 0.5:
            broken = bytearray(data)
            broken[draw.randrange(len(broken))] ^= 1 << draw.randrange(8)
            data = bytes(broken[: draw.randint(1, len(broken))] if draw.random() < 0.5 else broken)
    return data, f".jsonl{suffix}", draw


def command_of(stage, path, folder, draw, model):
    """The arguments of a case, and the files that it writes: (arguments, output, rejects)."""
    out, rejects = folder / "out.jsonl", None
    if stage == "validate":
        return [stage, path, "-q"], None, None
    if stage in ("pretrain", "finetune", "rft"):
        base = [stage, path, "-m", model, "-o", folder / "run", "--dry-run", "-q"]
        more = ["--method", "sft"] if stage == "rft" else []
        return [*base, *more, "--device", "cpu"], None, None
    if stage == "show":
        more = draw.choice([[], ["--worst", "2"], ["--id", "1"]])
        return [stage, path, *more], None, None
    command = [stage, path, "-o", out, "-q"]
    if stage == "compare":
        other = folder / f"other{''.join(path.suffixes)}"
        other.write_bytes(path.read_bytes())
        if draw.random() < 0.3:
            other = folder / "other.jsonl"
            rows = draw.choices(TEMPLATES["scored"], k=3)
            other.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return [stage, path, other, "-o", out, "-q"], None, None
    if stage == "rate" and draw.random() < 0.5:
        command += ["--verifier", draw.choice(["exact:accept", "gsm8k", "regex:me"])]
    if stage in ("convert", "tables"):
        command[0] = "convert"
        command += ["--to", draw.choice(TARGETS)]
        if draw.random() < 0.2:
            command += ["--by", "reward"]
    if stage in ("score", "sample"):
        command += ["-m", model, "--device", "cpu"]
    if stage == "sample":
        command += ["--max-new-tokens", "2", "--samples", "1"]
    if stage == "pair" and draw.random() < 0.3:
        command += ["--from-rollouts", "--label-by", "reward", "--rule", "rank"]
    if draw.random() < 0.4:
        rejects = folder / "bad.jsonl"
        command += ["--rejects", rejects]
    return command, out, rejects


def wrong_with(stage, status, said, path, out, rejects, data):
    """What a stage has done that it must not, or None."""
    lines = said.splitlines()
    if "Traceback" in said:
        return "a traceback"
    if status not in (0, 2, 3) and not (status == 1 and OF_ALL.search(said)):
        return f"status {status}"
    if any(len(line) > LONGEST_MESSAGE for line in lines):
        return "a message of more than 2000 characters"
    errors = [line for line in lines if line.startswith("polarctl: ")]
    most = 100 if stage == "validate" else 1  # which names all that is wrong
    if not min(status, 1) <= len(errors) <= min(status, 1) * most:
        return f"{len(errors)} errors for status {status}"
    if status == 3 and not (f"{path}:" in said or OF_ALL.search(said)):
        return "no file and line"
    if status or out is None:
        return None
    rows = [json.loads(line) for line in out.read_bytes().splitlines()] if out.exists() else []
    kept = rejects.read_bytes().count(b"\n") if rejects is not None and rejects.exists() else 0
    if stage == "score":
        plain = path.suffix == ".jsonl"
        given = sum(1 for line in data.split(b"\n") if line.strip())
        if plain and len(rows) + kept != given:
            return f"{given} rows gave {len(rows)} and {kept} rejects"
        for row in rows:
            rewards = row["rewards"] if "rewards" in row else [row["reward"]]
            if not all(type(r) is float and math.isfinite(r) for r in rewards):
                return f"a reward that is none: {rewards}"
    return None


def main(stage, seed, first, number, model):
    from polarctl import cli
    from polarctl.storage import manifest

    os.fsync = lambda handle: None  # nothing crashes here
    manifest.environment = dict
    statuses, bare = Counter(), 0
    real = os.dup(1)
    with tempfile.TemporaryDirectory() as top, open(f"{top}/said", "w+b") as said:
        os.dup2(said.fileno(), 2)
        os.dup2(said.fileno(), 1)
        for case in range(first, first + number):
            folder = Path(top) / str(case)
            folder.mkdir()
            data, suffix, draw = make(stage, seed, case)
            path = folder / f"in{suffix}"
            path.write_bytes(data)
            command, out, rejects = command_of(stage, path, folder, draw, model)
            said.truncate(0)
            said.seek(0)
            try:
                status = cli.run([str(word) for word in command])
                sys.stderr.flush()
                text = Path(said.name).read_bytes().decode("utf-8", "replace")
                why = wrong_with(stage, status, text, path, out, rejects, data)
            except BaseException:
                status, why, text = 1, "a traceback", traceback.format_exc()
            statuses[status] += 1
            if case == first + WARM:
                bare = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
                size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
                resource.setrlimit(resource.RLIMIT_AS, (size + GROWTH, size + GROWTH))
            if why:
                fault = {"case": case, "why": why, "status": status, "said": text[-1500:]}
                os.write(real, json.dumps(fault).encode() + b"\n")
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10) - bare
    totals = {"statuses": dict(statuses), "grown_mib": grown >> 20}
    os.write(real, json.dumps(totals).encode() + b"\n")


if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if word != "--show"]
    given_stage, given_seed, start, cases = words[0], *map(int, words[1:4])
    if "--show" in sys.argv:
        print(make(given_stage, given_seed, start)[0])
    else:
        main(given_stage, given_seed, start, cases, words[4] if len(words) > 4 else None)
