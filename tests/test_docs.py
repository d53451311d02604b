"""The documentation holds: references are fresh, and every command that is shown is a command.

Blocks fenced as `bash` in README.md and docs/ are found. In all of them every `polarctl STAGE ...`
is parsed by the real command line, so that no page can show an option that does not exist. A block
right after a comment `<!-- test: NAME -->` is run as well: `FIXTURES[NAME]` prepares a folder, and
the block runs there with `bash -euo pipefail`. Blocks fenced as `pycon` are run by doctest; those
of a page share a folder and their names.
"""

import contextlib
import doctest
import importlib.util
import io
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from typer.exceptions import TyperException

from polarctl import cli
from polarctl.errors import PolarctlError

ROOT = Path(__file__).parent.parent
GENERATED = ROOT / "docs" / "reference"

_spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
assert _spec is not None and _spec.loader is not None
generate = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(generate)


# -- what runs ------------------------------------------------------------------------------------


def empty(folder: Path) -> None:
    """Nothing is needed beforehand."""


def pipeline(folder: Path) -> None:
    """Two tiny policies, a pool file, and a few records of every kind that a user brings."""
    from tests.tiny import build_lm

    build_lm(folder / "models" / "base", seed=1)
    build_lm(folder / "models" / "small-sft", chat=True, seed=2)
    (folder / "runs").mkdir()

    def write(name: str, rows: list[dict]) -> None:
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    write(
        "pool.jsonl",
        [
            {"policy": f"p{i}", "model": f"models/{name}", "kind": "base", "temperature": t}
            for i, (name, t) in enumerate([("base", 1.0), ("small-sft", 0.8), ("base", 2.0)])
        ],
    )
    asked = [f"What is the sum of {i} and {i + 1}?" for i in range(8)]
    write("prompts.jsonl", [{"prompt": text} for text in asked])
    triple = {"reference": "It is 7.", "chosen": "The sum is 7.", "rejected": "It is Paris."}
    write("ranked.jsonl", [{"prompt": text, **triple} for text in asked])
    outputs = [{"name": name, "output": text} for name, text in (("a", "7"), ("b", "Paris"))]
    group = {"reference": "7", "candidates": [{**o, "label": o["name"] == "a"} for o in outputs]}
    write("candidates.jsonl", [{"prompt": text, **group} for text in asked])


def library(folder: Path) -> None:
    """A tiny reward model under two names, and what `pipeline` brings."""
    from tests.tiny import build_rm

    pipeline(folder)
    for name in ("rm", "rm-tuned"):
        build_rm(folder / "runs" / name, folder / "models" / "base")


def training(folder: Path) -> None:
    """A tiny base model and triples."""
    from tests.tiny import build_lm

    build_lm(folder / "models" / "base", seed=1)
    rows = [
        {"prompt": f"q{i}", "reference": right, "chosen": right, "rejected": wrong}
        for i in range(96)
        for right, wrong in [("yes", "no") if i % 2 else ("no", "yes")]
    ]
    (folder / "triples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def official(folder: Path) -> None:
    """A tiny model in the published layout, a policy, candidates and prompts."""
    from tests.model.internlm2.official import build_official
    from tests.tiny import build_lm

    build_official(folder / "POLAR-7B", format="bin", hidden=128, max_positions=512)
    build_lm(folder / "models" / "policy", chat=True, seed=2)
    asked = [f"What is the sum of {i} and {i + 1}?" for i in range(8)]
    outputs = [{"output": "7", "label": 1}, {"output": "Paris", "label": 0}]
    rows = [{"prompt": text, "reference": "It is 7."} for text in asked]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    groups = [json.dumps({**row, "candidates": outputs}) + "\n" for row in rows]
    (folder / "candidates.jsonl").write_text("".join(groups))


def formats(folder: Path) -> None:
    """Battles as CSV, pairs as a JSON array, and what `score` writes."""
    (folder / "battles.csv").write_text(
        'prompt,response_a,response_b,winner,model_a,model_b\n"[""Q""]","[""a""]","[""b""]",tie,x,y\n'
    )
    pair = {"question": "Q", "chosen": "a", "rejected": "b", "meta": {"gold": "R"}}
    (folder / "pairs.json").write_text(json.dumps([pair], indent=2))
    scored = {"prompt": "Q", "candidates": [{"output": "a"}, {"output": "b"}], "rewards": [0, 1]}
    (folder / "scored.jsonl").write_text(json.dumps(scored) + "\n")


def hand_over(folder: Path) -> None:
    """A tiny chat policy, a reward model and prompts with references."""
    from tests.tiny import build_lm, build_rm

    build_lm(folder / "models" / "policy", chat=True, seed=2)
    build_lm(folder / "models" / "base", seed=1)
    (folder / "runs").mkdir()
    build_rm(folder / "runs" / "rm", folder / "models" / "base")
    rows = [{"prompt": f"What is {i} + 4?", "reference": f"It is {i + 4}."} for i in range(8)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def evaluate(folder: Path) -> None:
    """Two reward models with opposite rewards; pairs that the first has right; rm-bench."""
    import torch

    from polarctl.model import reward_model
    from polarctl.scoring.scorer import Item, ModelScorer
    from tests.tiny import build_lm, build_rm

    build_lm(folder / "models" / "base", seed=1)
    (folder / "runs").mkdir()
    build_rm(folder / "runs" / "before", folder / "models" / "base")
    model = reward_model.load(str(folder / "runs" / "before"), device="cpu")
    pairs = [(f"What is {i} + 4?", f"It is {i + 4}.", f"Paris {i}") for i in range(24)]
    items = [Item(asked, right, text) for asked, right, wrong in pairs for text in (right, wrong)]
    rewards = [scored.reward for scored in ModelScorer(model).score(items)]
    rows = []
    for (asked, right, wrong), a, b in zip(pairs, rewards[::2], rewards[1::2], strict=True):
        chosen, rejected = (right, wrong) if a > b else (wrong, right)
        rows.append({"prompt": asked, "reference": right, "chosen": chosen, "rejected": rejected})
    (folder / "held-out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with torch.no_grad():
        model.model.score.weight.neg_()
    model.save(folder / "runs" / "new")
    (folder / "before").mkdir()
    (folder / "before" / "reward-model.txt").write_text("runs/before\n")
    (folder / "reward-model.txt").write_text("runs/new\n")
    answers = {"chosen": ["4", "is 4", "* 4"], "rejected": ["5", "is 5", "* 5"], "answer": "four"}
    bench = [{"id": i, "prompt": "2 + 2", "domain": "math", **answers} for i in range(2)]
    (folder / "rm-bench.json").write_text(json.dumps(bench))


@contextlib.contextmanager
def baselines(folder: Path) -> Iterator[dict[str, str]]:
    """Other people's models, tiny, in folders by their names, and a judge's server."""
    from tests.judge_server import JudgeServer
    from tests.scoring.test_chat_classifier import build_classifier
    from tests.tiny import build_lm

    build_classifier(folder / "Skywork" / "Skywork-Reward-V2-Llama-3.1-8B", context=256)
    build_lm(folder / "WisdomShell" / "RewardAnything-8B-v1", chat=True)
    outputs = [{"output": "7", "label": 1}, {"output": "Paris!", "label": 0}]
    row = {"prompt": "3 + 4?", "reference": "7", "principle": "Be right.", "candidates": outputs}
    (folder / "candidates.jsonl").write_text(json.dumps(row) + "\n")
    with JudgeServer() as server:
        yield {"JUDGE_URL": server.url}


@contextlib.contextmanager
def hub(folder: Path) -> Iterator[dict[str, str]]:
    """A Hub that has `internlm/POLAR-7B`, tiny."""
    from tests.download_hub import serving
    from tests.model.internlm2.official import build_official

    model = build_official(folder / "hub", format="safetensors", sharded=True, max_positions=512)
    with serving("internlm/POLAR-7B", model) as url:
        yield {"HF_ENDPOINT": url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(folder / "cache")}


# In the lane with vLLM: tests/engines/test_page.py; twice: tests/stages/test_rounds.py; in one slow
# test below: `evaluate`; all of a page in one folder: tests/test_your_data.py.
ELSEWHERE = ("vllm-serve", "vllm-client", "vllm-offline", "rounds", "evaluate", "your-data")

# What these show, quicker tests show too.
SLOW = ("guide", "pipeline", "corpus")

# Name in `<!-- test: NAME -->` to a function that prepares the folder; one that is a context holds
# something open meanwhile and gives environment variables.
FIXTURES: dict[str, Callable[[Path], Any]] = {
    "empty": empty,
    "evaluate": evaluate,
    "formats": formats,
    "guide": library,
    "baselines": baselines,
    "hand-over": hand_over,
    "hub": hub,
    "library": library,
    "official": official,
    "pipeline": pipeline,
    "corpus": library,
    "plan": training,
    "validate": training,
    "processes": training,
}


@dataclass(frozen=True)
class Block:
    """A fenced block of shell commands, or of Python.

    Attributes:
        where: `file:line` of its first line.
        text: What is inside.
        fixture: Name in the comment before it, or None.
    """

    where: str
    text: str
    fixture: str | None


FENCE = re.compile(
    r"^(?P<comment><!-- test: (?P<fixture>[\w-]+) -->\n\s*)?"
    r"^(?P<indent> *)```(?P<language>\w+)\n(?P<text>.*?)^(?P=indent)```$",
    re.M | re.S,
)


def blocks_of(text: str, name: str, language: str = "bash") -> list[Block]:
    """The blocks of a page in one language."""
    found = []
    for match in FENCE.finditer(text):
        if match["language"] != language:
            continue
        line = text.count("\n", 0, match.start("text")) + 1
        indent = len(match["indent"])
        inside = "".join(row[indent:] for row in match["text"].splitlines(keepends=True))
        found.append(Block(f"{name}:{line}", inside, match["fixture"]))
    return found


def commands_of(text: str) -> list[list[str]]:
    """The words after `polarctl` of every such command in a piece of shell."""
    lexer = shlex.shlex(text.replace("\\\n", " "), posix=True, punctuation_chars="|&;<>()\n")
    lexer.whitespace = " \t\r"
    lexer.commenters = "#"
    commands: list[list[str]] = [[]]
    skip = False
    for word in lexer:
        if set(word) <= set("|&;()\n"):
            commands.append([])
        elif set(word) <= set("<>"):
            skip = True  # the file of a redirection
        elif skip:
            skip = False
        else:
            commands[-1].append(word)
    found = []
    for words in commands:
        while words and re.fullmatch(r"\w+=.*", words[0]):
            words = words[1:]
        if words and words[0].rpartition("/")[2] == "polarctl":
            found.append(words[1:])
    return found


def pages() -> list[Path]:
    """README.md and every page that is written by hand."""
    written = [path for path in (ROOT / "docs").rglob("*.md") if GENERATED not in path.parents]
    return [path for path in (ROOT / "README.md", *sorted(written)) if path.exists()]


def page_blocks(path: Path, language: str) -> list[Block]:
    """The blocks of a file in one language."""
    return blocks_of(path.read_text(encoding="utf-8"), str(path.relative_to(ROOT)), language)


BLOCKS = [block for path in pages() for block in page_blocks(path, "bash")]
EXAMPLES = {path: found for path in pages() if (found := page_blocks(path, "pycon"))}


def parse(words: list[str]) -> None:
    """Parse a command line as the program does, without running it.

    Raises:
        TyperException, PolarctlError: It is wrong.
    """
    words = list(words)
    while "--config" in words:  # the file of an example need not exist
        at = words.index("--config")
        del words[at : at + 2]
    if not words or words[0].startswith("-"):
        return
    if words[0] not in cli.STAGES:
        raise PolarctlError(f"no stage `{words[0]}`")
    if {"-h", "--help"} & set(words):
        words = [word for word in words if word not in ("-h", "--help")]
    cli.stage_command(words[0]).make_context(f"polarctl {words[0]}", words[1:])


def test_every_command_shown_is_one_that_the_program_takes():
    for block in BLOCKS:
        for words in commands_of(block.text):
            try:
                parse(words)
            except (TyperException, PolarctlError) as error:
                pytest.fail(f"{block.where}: polarctl {' '.join(words)}: {error}")


def test_every_command_in_a_stages_docstring_is_one_that_the_program_takes():
    for stage in cli.STAGES:
        text = (ROOT / "stages" / f"{stage}.py").read_text(encoding="utf-8")
        doc = text.partition('"""')[2].partition('"""')[0]
        for line in re.findall(r"^ *polarctl .*(?:\\\n.*)*", doc, re.M):
            for words in commands_of(line):
                try:
                    parse(words)
                except (TyperException, PolarctlError) as error:
                    pytest.fail(f"{stage}: polarctl {' '.join(words)}: {error}")


@pytest.mark.parametrize(
    "block",
    [
        pytest.param(block, id=block.where, marks=pytest.mark.slow if block.fixture in SLOW else ())
        for block in BLOCKS
        if block.fixture and block.fixture not in ELSEWHERE
    ],
)
def test_a_marked_block_runs(block, tmp_path):
    assert block.fixture in FIXTURES, f"{block.where}: no fixture `{block.fixture}`"
    prepared = FIXTURES[block.fixture](tmp_path) or contextlib.nullcontext({})
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with prepared as variables:
        result = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", block.text],
            cwd=tmp_path,
            env={**os.environ, "PATH": path, **variables},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=600,
        )
    assert result.returncode == 0, f"{block.where}\n{result.stdout}\n{result.stderr}"


@pytest.mark.slow
def test_the_page_on_evaluation_and_its_workflow_run(tmp_path):
    """Every `run:` of the workflow but the installation, in order, as GitHub runs it.

    It fails a pull request with a worse model and no other. Then the blocks of the page.
    """
    import yaml

    text = (ROOT / "docs" / "guides" / "reward-model.yml").read_text(encoding="utf-8")
    steps = yaml.safe_load(text)["jobs"]["compare"]["steps"]
    commands = [(s["name"], s["run"]) for s in steps if "run" in s and s["name"] != "Install"]
    assert len(commands) == 4
    evaluate(tmp_path)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    summary = tmp_path / "summary.md"
    environment = {**os.environ, "PATH": path, "GITHUB_STEP_SUMMARY": str(summary)}

    def status(command: str) -> int:
        arguments = ["bash", "-e", "-c", command]
        return subprocess.run(arguments, cwd=tmp_path, env=environment, timeout=600).returncode

    def statuses() -> dict[str, int]:
        return {name: status(command) for name, command in commands}

    worse = statuses()
    assert worse.pop("Compare") == 5 and set(worse.values()) == {0}
    assert "is worse than before" in summary.read_text()
    (tmp_path / "reward-model.txt").write_text("runs/before\n")
    for made in ("new-scores.jsonl", "disagreements.jsonl"):
        (tmp_path / made).unlink()
        (tmp_path / f"{made}.manifest.json").unlink()
    assert set(statuses().values()) == {0}
    for block in BLOCKS:
        if block.fixture == "evaluate":
            assert status(f"rm -f *scores.jsonl* disagreements*\n{block.text}") == 0, block.where


@pytest.mark.parametrize("path", [pytest.param(path, id=path.name) for path in EXAMPLES])
def test_the_examples_of_a_page_run(path, tmp_path, monkeypatch):
    fixtures = {block.fixture for block in EXAMPLES[path]}
    assert len(fixtures) == 1 and fixtures <= set(FIXTURES), f"{path.name}: fixtures {fixtures}"
    FIXTURES[fixtures.pop()](tmp_path)
    monkeypatch.chdir(tmp_path)
    runner, names, said = doctest.DocTestRunner(), {}, io.StringIO()
    for block in EXAMPLES[path]:
        name, _, line = block.where.rpartition(":")
        test = doctest.DocTestParser().get_doctest(block.text, names, name, name, int(line) - 1)
        test.globs = names  # get_doctest took a copy
        runner.run(test, out=said.write, clear_globs=False)
    assert runner.tries and not runner.failures, said.getvalue()


TEXTS = 'prompt, reference, candidate = "What is 3 + 4?", "It is 7.", "The sum is 7."'


@pytest.mark.parametrize(
    ("texts", "holds"),
    [
        (TEXTS, True),
        ('prompt, reference, candidate = "Why?", "Because\\nit helps. 推", "Do not panic! "', True),
        ('prompt, reference, candidate = "Why?", "Because.", ""', False),  # no newline is written
        ('prompt, reference, candidate = "Why?", "Because.", "So. " * 99', False),  # cut to fit
        ('prompt, reference, candidate = "Why?", "Because.", "a<|reward|>b"', False),  # cleaned
    ],
)
def test_the_readmes_plain_transformers_give_the_rewards_of_score(
    texts, holds, tmp_path, monkeypatch
):
    (block,) = page_blocks(ROOT / "README.md", "python")
    assert TEXTS in block.text and block.fixture == "library"
    library(tmp_path)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(block.text.replace(TEXTS, texts), names)
    row = {"prompt": names["prompt"], "reference": names["reference"]}
    Path("one.jsonl").write_text(json.dumps({**row, "output": names["candidate"]}) + "\n")
    words = ["one.jsonl", "-m", "runs/rm-tuned", "-o", "scored.jsonl", "--device", "cpu"]
    assert cli.run(["score", *words]) == 0
    scored = json.loads(Path("scored.jsonl").read_text())
    assert (abs(names["reward"] - scored["reward"]) < 1e-5) == holds

    import torch

    from polarctl.encoding import Encoder

    encoder = Encoder(names["tokenizer"], **names["model"].config.polar)
    ids = encoder.encode(names["prompt"], names["reference"], names["candidate"])
    with torch.inference_mode():
        reward = names["model"](torch.tensor([ids])).logits.item()
    assert reward == pytest.approx(scored["reward"], abs=1e-5)  # whatever the texts


@pytest.mark.parametrize("name", generate.PAGES)
def test_the_generated_reference_is_fresh(name):
    stored = (GENERATED / name).read_text(encoding="utf-8")
    assert stored == generate.PAGES[name](), "stale: run `make reference`"


def test_links_between_pages_lead_somewhere():
    for path in pages():
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8")):
            if not re.match(r"[a-z]+:", target):
                assert (path.parent / target).exists(), f"{path.relative_to(ROOT)}: {target}"


# -- the finder itself ----------------------------------------------------------------------------


def test_blocks_are_found_with_their_line_and_fixture():
    page = "# A\n\n```bash\nls\n```\n\n<!-- test: empty -->\n```bash\na\nb\n```\n```text\nno\n```\n"
    assert blocks_of(page, "p.md") == [
        Block("p.md:4", "ls\n", None),
        Block("p.md:9", "a\nb\n", "empty"),
    ]
    assert blocks_of(page, "p.md", "text") == [Block("p.md:13", "no\n", None)]
    assert blocks_of("* x\n\n  ```bash\n  ls\n  ```\n", "p")[0].text == "ls\n"


def test_commands_are_found_in_pipes_lists_and_continued_lines():
    text = """
    # polarctl in a comment
    X=1 .venv/bin/polarctl sample p.jsonl --pool 'a b' \\
        -o - | polarctl pair - > out.jsonl && echo polarctl
    (polarctl eval < in.jsonl); polarctl validate a.jsonl  # why
    """
    assert commands_of(text) == [
        ["sample", "p.jsonl", "--pool", "a b", "-o", "-"],
        ["pair", "-"],
        ["eval"],
        ["validate", "a.jsonl"],
    ]


def test_a_wrong_command_is_caught():
    parse(["validate", "a.jsonl", "--kind", "triple"])
    for wrong in (["validate", "--knd", "x"], ["valid"], ["schema", "a", "b"]):
        with pytest.raises((TyperException, PolarctlError)):
            parse(wrong)
