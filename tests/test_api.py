"""What `import polarctl` offers gives what the program gives: its bytes are what is compared with.

Rewards are compared as numbers that went through JSON, which keeps every digit of a float: equal
means equal.
"""

import gzip
import json
import math
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import zstandard
from tiny import build_chat_rm

import polarctl
from polarctl import RewardModel
from polarctl.cli import run
from polarctl.errors import MissingError, PolarctlError, RecordError, UsageError

TURNS = [
    {"role": "user", "content": "Why?"},
    {"role": "assistant", "content": "Because."},
    {"role": "user", "content": [{"type": "text", "text": "And "}, {"type": "text", "text": "so"}]},
]
PROMPTS = ["What is the sum of 3 and 4?", "Why?", TURNS, "What is the capital of France?"]
REFERENCES = ["The sum is 7.", "Because it helps.", [{"role": "assistant", "content": "So."}], ""]
OUTPUTS = [
    ["It is 7.", "7", "Do not panic!"],
    ["Because.", ""],
    ["The sea was calm that day. " * 4],
    ["It is Paris.", [{"role": "assistant", "content": "Paris 推 🙂"}], "It is Paris.", "Lyon"],
]


@pytest.fixture(scope="module")
def model(tiny_rm):
    return RewardModel.from_pretrained(tiny_rm, device="cpu")


@pytest.fixture(scope="module")
def chat_rm(tmp_path_factory):
    return build_chat_rm(tmp_path_factory.mktemp("models") / "skywork", context=256)


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def told(tmp_path, folder, rows, *options):
    """The records that `polarctl score` writes."""
    out = tmp_path / "cli.jsonl"
    words = [jsonl(tmp_path / "given.jsonl", rows), "-m", str(folder), "-o", str(out)]
    assert run(["score", *words, "--device", "cpu", *options]) == 0
    return rows_of(out)


def groups(prompts=PROMPTS, references=REFERENCES, outputs=OUTPUTS):
    return [
        {"prompt": p, "reference": r, "candidates": [{"output": o} for o in group]}
        for p, r, group in zip(prompts, references, outputs, strict=True)
    ]


# -- score ----------------------------------------------------------------------------------------


def test_one_text_has_the_reward_that_the_program_gives(model, tiny_rm, tmp_path):
    rows = [{"prompt": PROMPTS[0], "reference": REFERENCES[0], "output": "It is 7."}]
    (record,) = told(tmp_path, tiny_rm, rows)
    reward = model.score(PROMPTS[0], REFERENCES[0], "It is 7.")
    assert isinstance(reward, float)
    assert reward == record["reward"] != 0


@pytest.mark.parametrize("i", range(len(PROMPTS)))
def test_candidates_have_the_rewards_that_the_program_gives(i, model, tiny_rm, tmp_path):
    (record,) = told(tmp_path, tiny_rm, groups()[i : i + 1])
    assert model.score(PROMPTS[i], REFERENCES[i], OUTPUTS[i]) == record["rewards"]


def test_a_batch_has_the_rewards_that_the_program_gives(model, tiny_rm, tmp_path):
    records = told(tmp_path, tiny_rm, groups())
    assert model.score(PROMPTS, REFERENCES, OUTPUTS) == [r["rewards"] for r in records]
    firsts = [group[0] for group in OUTPUTS]
    records = told(tmp_path, tiny_rm, groups(outputs=[[one] for one in firsts]), "--force")
    assert model.score(PROMPTS, REFERENCES, firsts) == [r["rewards"][0] for r in records]


def test_the_wrapper_of_continuations(model, tiny_rm, tmp_path):
    row = {"prompt": "The sea", "reference": " was calm.", "output": " lay still."}
    (record,) = told(tmp_path, tiny_rm, [{**row, "wrapper": "pretrain"}])
    assert model.score(*row.values(), wrapper="pretrain") == record["reward"]
    assert model.score(*row.values()) != record["reward"]
    with pytest.raises(RecordError, match="wrapper"):
        model.score(*row.values(), wrapper="plain")


def test_no_candidates_have_no_rewards(model):
    assert model.score("Why?", "So.", []) == []
    assert model.score([], [], []) == []
    assert model.score(["Why?", "And?"], ["So.", "No."], [[], ["So."]])[0] == []


def test_lists_that_are_no_batch_are_refused(model):
    with pytest.raises(ValueError, match="2 prompts, 1 references and 2 outputs"):
        model.score(["a", "b"], ["c"], ["d", "e"])
    with pytest.raises(ValueError, match="must be lists"):  # as long as the batch, by chance
        model.score(["a", "b"], "ab", ["d", "e"])
    with pytest.raises(ValueError, match="must be lists"):
        model.score(["a", "b"], ["c", "d"], "ab")
    with pytest.raises(ValueError, match="not both"):
        model.score(["a", "b"], ["c", "d"], [["e"], "f"])
    with pytest.raises(RecordError, match="reference"):
        model.score("a", ["c", "d"], "e")
    with pytest.raises(RecordError, match="item 2"):
        model.score(["a", "b"], ["c", 7], ["d", "e"])


def test_a_cut_is_said(model, capfd):
    model.score("Why?", "So.", "The sea was calm that day. " * 60)
    assert "1 of 1 inputs" in capfd.readouterr().err


def test_a_device_or_a_precision_that_does_not_exist_is_refused(tiny_rm, tiny_lm, tmp_path):
    load = RewardModel.from_pretrained
    for wrong in ({"device": "abacus"}, {"dtype": "float7"}, {"batch_tokens": 0}):
        with pytest.raises(UsageError):
            load(tiny_rm, **{"device": "cpu", **wrong})
    for folder in (tiny_lm, tmp_path):
        with pytest.raises(MissingError):
            load(folder, device="cpu")


# -- records --------------------------------------------------------------------------------------


def test_records_of_all_shapes_are_those_that_the_program_writes(model, tiny_rm, tmp_path):
    single = {"prompt": TURNS, "reference": "So.", "output": "Because.", "id": "a", "more": [1]}
    triple = {"prompt": "Why?", "reference": "So.", "chosen": "So!", "rejected": "No."}
    several = {"prompt": "Why?", "references": ["So.", "Because."], "output": "Because it helps."}
    rows = [single, *groups(), triple, several, {**single, "wrapper": "pretrain"}]
    assert list(model.score_records(rows)) == told(tmp_path, tiny_rm, rows)


def test_more_records_than_a_window(model, tiny_rm, tmp_path):
    """Neighbours decide a reward's last digit, so the library has to give it the same ones."""
    rows = [
        {"prompt": f"What is {i}?", "reference": "It is 7.", "output": f"The sum is {i % 11}."}
        for i in range(520)
    ]
    assert list(model.score_records(iter(rows))) == told(tmp_path, tiny_rm, rows)


def test_without_references(tiny_rm, tmp_path):
    rows = [{"prompt": row["prompt"], "candidates": row["candidates"]} for row in groups()]
    model = RewardModel.from_pretrained(tiny_rm, device="cpu", no_reference=True)
    records = told(tmp_path, tiny_rm, rows, "--no-reference")
    assert list(model.score_records(rows)) == records
    assert model.score(PROMPTS, REFERENCES, OUTPUTS) == [r["rewards"] for r in records]


def test_a_bad_record_is_named_by_file_and_line(model, tmp_path):
    path = jsonl(tmp_path / "c.jsonl", [groups()[0], {"prompt": "a", "output": "b"}])
    with pytest.raises(RecordError, match=r"c\.jsonl:2: missing field `reference`"):
        list(model.score_records(polarctl.read(path)))
    with pytest.raises(RecordError, match="record 2: missing field `prompt`"):
        list(model.score_records([groups()[0], {"output": "b"}]))


def test_a_reward_that_is_not_finite_is_an_error(tiny_rm, tmp_path):
    import torch

    from polarctl.model import reward_model

    broken = reward_model.load(str(tiny_rm))
    torch.nn.init.constant_(broken.model.score.weight, math.nan)
    broken.save(tmp_path / "rm")
    with pytest.raises(PolarctlError, match="not finite"):
        RewardModel.from_pretrained(tmp_path / "rm", device="cpu").score("a", "b", "c")


# -- other reward models --------------------------------------------------------------------------


def test_a_chat_classifier_has_the_rewards_that_the_program_gives(chat_rm, tmp_path):
    model = RewardModel.from_pretrained(chat_rm, device="cpu")
    rows = [{k: v for k, v in row.items() if k != "reference"} for row in groups()]
    records = told(tmp_path, chat_rm, rows)
    assert list(model.score_records(rows)) == records
    rewards = [r["rewards"] for r in records]
    assert model.score(PROMPTS, [""] * 4, OUTPUTS) == rewards
    assert model.score(PROMPTS, REFERENCES, OUTPUTS) == rewards  # it reads no reference
    with pytest.raises(UsageError, match="not a POLAR model"):
        model.save_pretrained(tmp_path / "copy")


# -- save -----------------------------------------------------------------------------------------


def test_a_saved_model_is_the_same_model(model, tiny_rm, tmp_path):
    before = model.score(PROMPTS, REFERENCES, OUTPUTS)  # its attention was exchanged for this
    folder = tmp_path / "new" / "rm"
    model.save_pretrained(folder)
    names = {path.name for path in tiny_rm.iterdir()}
    assert {path.name for path in folder.iterdir()} == names
    for name in names:
        assert (folder / name).read_bytes() == (tiny_rm / name).read_bytes(), name
    again = RewardModel.from_pretrained(str(folder), device="cpu")
    assert again.score(PROMPTS, REFERENCES, OUTPUTS) == before
    again.save_pretrained(folder)
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be made"):
        model.save_pretrained(tmp_path / "file")


# -- read and write -------------------------------------------------------------------------------

ROWS = [{"prompt": "推 é", "n": 2**63 + 1, "x": 0.1, "more": {"a": [None, True]}}, {"prompt": "b"}]


@pytest.mark.parametrize(
    ("name", "unpack"),
    [
        ("a.jsonl", bytes),
        ("a.jsonl.gz", gzip.decompress),
        ("a.jsonl.zst", lambda raw: zstandard.ZstdDecompressor().stream_reader(raw).read()),
    ],
)
def test_what_is_written_is_read(name, unpack, tmp_path):
    path = tmp_path / name
    assert polarctl.write(path, iter(ROWS)) == 2
    assert [json.loads(line) for line in unpack(path.read_bytes()).splitlines()] == ROWS
    assert list(polarctl.read(path)) == ROWS
    assert [record.where for record in polarctl.read(path, "prompt")] == [f"{path}:1", f"{path}:2"]
    assert os.listdir(tmp_path) == [name]


def test_several_files_and_globs_are_read_in_order(tmp_path):
    for i in range(3):
        polarctl.write(tmp_path / f"{i}.jsonl", [{"prompt": str(i)}])
    one = [r["prompt"] for r in polarctl.read(str(tmp_path / "*.jsonl"))]
    two = [r["prompt"] for r in polarctl.read([tmp_path / "2.jsonl", str(tmp_path / "[01].jsonl")])]
    assert (one, two) == (["0", "1", "2"], ["2", "0", "1"])


def test_a_file_is_not_replaced_unless_asked_for(tmp_path):
    path = tmp_path / "a.jsonl"
    polarctl.write(path, ROWS)
    before = path.read_bytes()
    with pytest.raises(UsageError, match="exists"):
        polarctl.write(path, [])
    with pytest.raises(ZeroDivisionError):
        polarctl.write(path, ({"x": 1 / i} for i in (1, 0)), overwrite=True)
    assert path.read_bytes() == before
    changed = ({**record, "seen": True} for record in polarctl.read(path))
    assert polarctl.write(path, changed, overwrite=True) == 2  # reads what it replaces
    assert [record["seen"] for record in polarctl.read(path)] == [True, True]
    (tmp_path / "link.jsonl").symlink_to(path)
    assert polarctl.write(tmp_path / "link.jsonl", [], overwrite=True) == 0
    assert path.read_bytes() == b"" and list(polarctl.read(path)) == []
    with pytest.raises(UsageError, match="folder"):
        polarctl.write(tmp_path, ROWS, overwrite=True)
    with pytest.raises(UsageError, match="cannot be written"):
        polarctl.write(tmp_path / "no" / "a.jsonl", ROWS)
    assert sorted(os.listdir(tmp_path)) == ["a.jsonl", "link.jsonl"]


@pytest.mark.parametrize("wrong", [math.nan, [{"a": -math.inf}], {1: 2}, 2**64, object()])
def test_what_json_cannot_hold_is_not_written(wrong, tmp_path):
    with pytest.raises(RecordError, match="^record 2: "):
        polarctl.write(tmp_path / "a.jsonl", [{"x": 1}, {"x": wrong}])
    assert os.listdir(tmp_path) == []


def test_a_bad_line_is_named_by_file_and_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "a"}\n\n{"prompt": 7}\n{"prompt"\n')
    records = polarctl.read(path, kind="prompt")
    assert next(records) == {"prompt": "a"}
    with pytest.raises(RecordError, match=r"a\.jsonl:3: field `prompt`") as found:
        next(records)
    assert found.value.hint is None  # an option of the program would be no help
    with pytest.raises(RecordError, match=r"a\.jsonl:4: "):
        list(polarctl.read(path))
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"a": 1}\n' * 999)[:-9])
    with pytest.raises(RecordError, match=r"cut\.jsonl\.gz"):
        list(polarctl.read(tmp_path / "cut.jsonl.gz"))
    with pytest.raises(UsageError, match="no such file"):
        polarctl.read(tmp_path / "none.jsonl")
    with pytest.raises(UsageError, match="no schema named `tripel`"):
        polarctl.read(path, kind="tripel")


# -- evaluate -------------------------------------------------------------------------------------


def labelled():
    def row(i, rewards, labels):
        outputs = [{"output": f"answer {j} {i}", "label": label} for j, label in enumerate(labels)]
        fields = {"source": f"s{i % 2}", "category": "a" if i % 3 else "b", "rewards": rewards}
        return {"prompt": f"q{i % 4}", "reference": "answer 1", "candidates": outputs, **fields}

    many = [row(i, [math.sin(i), math.cos(i), 0.1], [1, 0, 0.5]) for i in range(9)]
    triple = {"prompt": "q", "reference": "a b", "chosen": "a b", "rejected": "c"}
    return [*many, {**triple, "rewards": [1, 2]}, row(9, [1.0, 2.0], [1, 1])]


@pytest.mark.parametrize("options", [{}, {"by": "source", "seed": 3}])
def test_the_report_is_that_of_the_program(options, tmp_path):
    given = jsonl(tmp_path / "scored.jsonl", labelled())
    more = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    report, out = tmp_path / "report", tmp_path / "verdicts.jsonl"
    assert run(["eval", given, "-o", str(out), "--report", str(report), *more]) == 0
    verdicts = []
    found = polarctl.evaluate(polarctl.read(given), on_verdict=verdicts.append, **options)
    assert found == json.loads((report / "report.json").read_text())
    assert found["skipped"] == {"no better and worse candidate": 1}
    assert verdicts == rows_of(out)
    assert polarctl.evaluate(labelled(), **options) == found


def test_scored_records_are_evaluated_as_by_the_program(model, tiny_rm, tmp_path):
    rows = [
        {"prompt": f"What is {i}?", "reference": "7", "chosen": "7", "rejected": str(i)}
        for i in range(12)
    ]
    given = jsonl(tmp_path / "triples.jsonl", rows)
    report = tmp_path / "report"
    words = ["-m", str(tiny_rm), "--device", "cpu", "--report", str(report)]
    assert run(["eval", given, "-o", str(tmp_path / "v.jsonl"), *words]) == 0
    found = polarctl.evaluate(model.score_records(rows))
    assert found == json.loads((report / "report.json").read_text())


def test_what_cannot_be_evaluated_is_named():
    rows = labelled()
    with pytest.raises(UsageError, match="`--by sauce`"):
        polarctl.evaluate(rows, by="sauce")
    with pytest.raises(RecordError, match="nothing to compare in 1 record"):
        polarctl.evaluate(rows[-1:])
    with pytest.raises(RecordError, match="nothing to compare in 0 record"):
        polarctl.evaluate([])
    for wrong in ({"prompt": "a"}, {**rows[0], "rewards": [1.0]}, {**rows[0], "prompt": 7}):
        with pytest.raises(RecordError, match="record 2: "):
            polarctl.evaluate([rows[0], wrong])


# -- the package ----------------------------------------------------------------------------------

HEAVY = "torch transformers numpy matplotlib trl vllm deepspeed accelerate"


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import polarctl; polarctl.__version__; dir(polarctl)", f"{HEAVY} msgspec orjson rich"),
        ("from polarctl import RewardModel, read, write, evaluate", HEAVY),
        ("import polarctl; polarctl.write('a', [{}]); list(polarctl.read('a'))", HEAVY),
    ],
)
def test_nothing_heavy_is_loaded_before_it_is_needed(code, absent, tmp_path):
    code += "; import sys; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert "polarctl" in done.stdout.split()
    assert not set(done.stdout.split()) & set(absent.split())


def test_the_names_that_are_offered():
    assert polarctl.__all__ == ["RewardModel", "evaluate", "read", "write"]
    assert set(polarctl.__all__) <= set(dir(polarctl))
    with pytest.raises(AttributeError, match="reed"):
        polarctl.reed  # noqa: B018


def test_a_type_checker_knows_what_score_returns(tmp_path):
    (tmp_path / "mypy.ini").write_text(
        "[mypy]\npython_version = 3.11\nfollow_imports = skip\n"
        "[mypy-polarctl,polarctl.api]\nfollow_imports = normal\n"
    )
    (tmp_path / "use.py").write_text(
        textwrap.dedent("""\
        from typing import assert_type
        from polarctl import RewardModel

        model = RewardModel.from_pretrained("rm")
        turns = [{"role": "user", "content": "a"}]
        assert_type(model.score("a", "b", "c"), float)
        assert_type(model.score(turns, "b", turns), float)
        assert_type(model.score("a", "b", ["c", "d"]), list[float])
        assert_type(model.score("a", "b", [turns, "d"]), list[float])
        assert_type(model.score(["a"], ["b"], ["c"]), list[float])
        assert_type(model.score(["a", turns], ["b", "c"], [["c"], ["d"]]), list[list[float]])
        model.score("a", "b")
        """)
    )
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "use.py"],
        cwd=tmp_path,
        env={**os.environ, "MYPYPATH": str(Path(polarctl.__file__).parent.parent)},
        capture_output=True,
        text=True,
    )
    errors = [line for line in done.stdout.splitlines() if ": error: " in line]
    assert len(errors) == 1 and errors[0].startswith("use.py:12: "), done.stdout + done.stderr
