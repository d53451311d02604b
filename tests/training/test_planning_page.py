"""The figures of docs/guides/planning.md are those that its commands print with --dry-run.

Models and data are made here: configs of the published shapes, and triples of as many tokens as the
paper's have on average, by a small tokenizer. `WRITE=1` puts new figures into the page.
"""

import json
import os
import random
import re
import shlex
from pathlib import Path

import pytest
from test_plan import LLAMA_8B, bare

from polarctl import cli

PAGE = Path(__file__).parent.parent.parent / "docs" / "guides" / "planning.md"
# InternLM2-1.8B and InternLM2.5-7B, of which POLAR was made.
SHAPES = {
    "internlm2-1_8b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
    },
    "internlm2_5-7b": {},
}
# A command, and below it what its plan says.
BLOCKS = re.compile(r"```bash\n([^`]*)```\n\n```text\n([^`]*)```")
WANTED = ("memory:", "main memory:", "disk:", "time:", "flags:")


def made(folder):
    """The page's files: two models without weights, and triples of about 6,800 tokens."""
    (folder / "internlm").mkdir()
    for name, shape in SHAPES.items():
        config = {**LLAMA_8B, "vocab_size": 92544, "max_position_embeddings": 32768, **shape}
        bare(folder / "internlm" / name, config)
    draw = random.Random(0)

    def text(words):
        return " ".join(draw.choice(["sea", "boat", "sum", "seven", "Paris"]) for _ in range(words))

    rows = []
    for _ in range(64):
        size = round(draw.lognormvariate(0, 0.5) * 370)
        answers = {name: text(size) for name in ("reference", "chosen", "rejected")}
        rows.append({"prompt": text(130), **answers})
    (folder / "triples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "ranked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def planned(command, capfd):
    """What a command's plan says of its machine; the tokens of a triple."""
    words = shlex.split(command.replace("\\\n", " "))
    assert words[0] == "polarctl"
    more = [word for word in ("--dry-run", "--plan-for", "H100") if word not in words]
    assert cli.run([*words[1:], *more]) == 0
    said = [line.strip() for line in capfd.readouterr().err.splitlines()]
    tokens = next(int(line.split()[2].replace(",", "")) for line in said if "a triple:" in line)
    return "".join(f"{line}\n" for line in said if line.startswith(WANTED)), tokens


@pytest.mark.slow
def test_the_page_shows_what_its_commands_print(tmp_path, monkeypatch, capfd):
    made(tmp_path)
    monkeypatch.chdir(tmp_path)
    page = PAGE.read_text()
    blocks = list(BLOCKS.finditer(page))
    assert len(blocks) == 8
    new = page
    for block in blocks:
        said, tokens = planned(block[1], capfd)
        assert 6_600 < tokens < 7_100  # the paper's: 0.94e12 / 142.6e6, and 3.6e12 / 510e6
        new = new.replace(block[0], f"```bash\n{block[1]}```\n\n```text\n{said}```", 1)
        asked = set(shlex.split(block[1].replace("\\\n", " ")))
        flags = said.splitlines()[-1].split()[1:]
        assert set(flags) <= asked, f"the page's command lacks flags of its plan: {flags}"
    if os.environ.get("WRITE"):
        PAGE.write_text(new)
    assert new == page or os.environ.get("WRITE")
