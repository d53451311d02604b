"""Files of a run that somebody has damaged or put there: one line or the state before, no more."""

import json
import shutil
from pathlib import Path

import orjson
import pytest

from polarctl import cli
from polarctl.errors import UsageError
from polarctl.storage import checkpoint, run_folder


def saved(folder: Path, step: int, identity: dict | None = None) -> Path:
    target = folder / f"step-{step:08d}"
    target.mkdir(parents=True)
    (target / "model.safetensors").write_bytes(bytes([step]) * 100)
    checkpoint.commit(target, step, identity or {"seed": 10}, best=0.5)
    return target


def newest_step(folder: Path) -> int | None:
    found = checkpoint.newest(folder)
    return found and found[1]["step"]


# -- checkpoints ----------------------------------------------------------------------------------


def test_a_flipped_bit_of_the_newest_mark_takes_the_checkpoint_before(tmp_path):
    saved(tmp_path, 1)
    mark = saved(tmp_path, 2) / "checkpoint.json"
    whole = mark.read_bytes()
    for place in range(0, len(whole) * 8, 5):
        broken = bytearray(whole)
        broken[place // 8] ^= 1 << place % 8
        mark.write_bytes(broken)
        found = checkpoint.newest(tmp_path)
        assert found is not None and found[1]["step"] == 1, (place, bytes(broken))
    mark.write_bytes(whole)
    target, content = checkpoint.newest(tmp_path)
    assert target == mark.parent
    assert (content["step"], content["identity"], content["best"]) == (2, {"seed": 10}, 0.5)


@pytest.mark.parametrize("harm", ["cut", "flip", "delete", "add", "another file"])
def test_a_checkpoint_with_any_file_damaged_is_none(tmp_path, harm):
    saved(tmp_path, 1)
    file = saved(tmp_path, 2) / "model.safetensors"
    data = file.read_bytes()
    if harm == "delete":
        file.unlink()
    elif harm == "another file":
        (file.parent / "optimizer.safetensors").write_bytes(b"")
    else:
        flipped = data[:50] + bytes([data[50] ^ 1]) + data[51:]
        file.write_bytes({"cut": data[:-1], "flip": flipped, "add": data + b"\0"}[harm])
    assert newest_step(tmp_path) == 1


@pytest.mark.parametrize("content", [b"", b"[]", b"3", b"[" * 900, b'{"sha256": 1}', b"\xff"])
def test_a_mark_that_is_none_takes_the_checkpoint_before(tmp_path, content):
    saved(tmp_path, 1)
    (saved(tmp_path, 2) / "checkpoint.json").write_bytes(content)
    assert newest_step(tmp_path) == 1


NAMES = ["step-", "step-abc", "step-2.tmp", "notes-3", "step-1²", "step-" + "9" * 200, "step-5 (2)"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("folder", [True, False])
def test_other_names_beside_checkpoints_are_left_alone(tmp_path, name, folder):
    saved(tmp_path, 1)
    other = tmp_path / name
    if folder:
        other.mkdir()
    else:
        other.write_text("mine")
    saved(tmp_path, 2)
    saved(tmp_path, 3)
    assert newest_step(tmp_path) == 3
    assert other.exists()
    assert sorted(p.name for p in tmp_path.iterdir() if p != other) == [
        "step-00000002",
        "step-00000003",
    ]


def test_a_file_or_a_link_with_the_name_of_a_checkpoint_is_none(tmp_path):
    inside = tmp_path / "checkpoints"
    saved(inside, 1)
    (inside / "step-00000009").write_text("mine")
    elsewhere = saved(tmp_path / "elsewhere", 7)
    (inside / "step-00000008").symlink_to(elsewhere)
    assert newest_step(inside) == 1
    saved(inside, 2)
    assert elsewhere.exists() and (inside / "step-00000009").exists()


@pytest.mark.parametrize("line", [b'{"loss": 1', b"\xff\xfe", b"[" * 2000])
def test_a_damaged_line_of_metrics_is_named(tmp_path, line):
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_bytes(b'{"loss": 2}\n' + line + b"\n")
    with pytest.raises(UsageError, match=r"metrics.jsonl:2: no JSON"):
        run_folder.keep_lines(metrics, 2)
    assert run_folder.keep_lines(metrics, 1) == b'{"loss": 2}\n'


# -- journals and manifests -----------------------------------------------------------------------


def begun(folder: Path) -> tuple[list[str], Path, bytes]:
    """A command, its output as a killed run leaves it, and the bytes of the whole output."""
    source, out = folder / "in.jsonl", folder / "out.jsonl"
    rows = [{"prompt": str(n), "output": "b"} for n in range(3000)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows) + "{broken\n")
    command = ["convert", str(source), "--to", "native", "-o", str(out), "-q"]
    assert cli.run(command) == 3
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert cli.run([*command[:-3], "-o", str(folder / "whole.jsonl")]) == 0
    return command, out, (folder / "whole.jsonl").read_bytes()


ENTRIES = [
    {"done": 1},
    {"done": "1", "file": [5, "x"], "rejects": None},
    {"done": 1, "file": 3, "rejects": None},
    {"done": 1, "file": [10**30, None]},
    {"swap": 3},
    {"swap": [["a", "b", "c"]]},
    {"done": 1, "file": [1, "x"], "rejects": None, "counts": []},
]


@pytest.mark.parametrize("entry", [*ENTRIES, [], 3, None, "text"])
@pytest.mark.parametrize("hidden", [False, True])
def test_a_malformed_entry_of_a_journal_is_no_entry(tmp_path, capfd, entry, hidden):
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"prompt": "a", "output": "b"}\n')
    command = ["convert", str(source), "--to", "native", "-o", str(out), "-q"]
    if hidden:
        assert cli.run(command) == 0
        command.append("--force")
    journal = tmp_path / (".polarctl-next.out.jsonl.journal" if hidden else "out.jsonl.journal")
    journal.write_bytes(b'{"stage": "convert"}\n' + json.dumps(entry).encode() + b"\n")
    assert cli.run(command) == 0, capfd.readouterr().err
    assert out.read_bytes() == b'{"prompt":"a","output":"b"}\n'


MANIFESTS = [[], 3, {}, {"stage": 1, "outputs": []}, {"stage": 1, "outputs": {"out.jsonl": 3}}]
MANIFESTS += [{"stage": 1, "outputs": {"out.jsonl": {}}, "fingerprint": [], "inputs": 5}]


@pytest.mark.parametrize("content", [*MANIFESTS, {"stage": "convert", "outputs": None}])
@pytest.mark.parametrize("force", [True, False])
def test_a_malformed_manifest_is_said_to_be_none(tmp_path, capfd, content, force):
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"prompt": "a", "output": "b"}\n')
    command = ["convert", str(source), "--to", "native", "-o", str(out), "-q"]
    assert cli.run(command) == 0
    Path(f"{out}.manifest.json").write_text(json.dumps(content))
    before = out.read_bytes()
    status = cli.run([*command, "--force"] if force else command)
    err = capfd.readouterr().err
    assert status == 2 or (force and status == 0), err
    assert out.read_bytes() == before


@pytest.mark.parametrize("content", [*MANIFESTS, {"outputs": {"config.json": 3}}])
@pytest.mark.parametrize("force", [True, False])
def test_a_malformed_manifest_of_a_folder_is_said_to_be_none(
    tmp_path, tiny_lm, capfd, content, force
):
    source, out = tmp_path / "in.jsonl", tmp_path / "rm"
    source.write_text('{"prompt": "a", "reference": "b", "chosen": "b", "rejected": "c"}\n')
    out.mkdir()
    (out / "config.json").write_text("{}")
    (out / "manifest.json").write_text(json.dumps(content))
    command = ["finetune", str(source), "-m", str(tiny_lm), "-o", str(out), "--device", "cpu"]
    assert cli.run([*command, "--force"] if force else command) == 2
    assert f"{out}: is not replaced" in capfd.readouterr().err


# -- models ---------------------------------------------------------------------------------------

TEMPLATES = [
    {"separator": 3},
    {"separator": None},
    {"separator": ["a"]},
    {"reward_token": {}},
    {"max_length": 1e400},
    {"cut_side": []},
    {"unknown": 1},
    [],
    "text",
]


@pytest.fixture(scope="module")
def candidates(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "candidates.jsonl"
    path.write_text('{"prompt": "a", "reference": "b", "output": "c"}\n')
    return path


def with_config(model: Path, folder: Path, content: object) -> Path:
    shutil.copytree(model, folder)
    (folder / "config.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_template_that_is_none_is_one_line(tmp_path, tiny_rm, candidates, capfd, template):
    config = {**orjson.loads((tiny_rm / "config.json").read_bytes()), "polar": template}
    model = with_config(tiny_rm, tmp_path / "rm", config)
    assert cli.run(["score", str(candidates), "-m", str(model), "--device", "cpu"]) == 2
    assert f"{model}: its template does not work: " in capfd.readouterr().err


CONFIGS: list = [[], 3, "text", None, {}, {"model_type": 3}, {"model_type": "internlm2"}]
CONFIGS += [{"architectures": 3}, {"architectures": [3]}, {"num_labels": "1"}, {"id2label": 3}]
CONFIGS += [{"hidden_size": "x"}, {"rope_parameters": 3}, {"max_position_embeddings": "x"}]


@pytest.mark.parametrize("content", CONFIGS)
def test_a_config_that_is_none_is_one_line(tmp_path, tiny_rm, candidates, capfd, content):
    if isinstance(content, dict) and content and content.get("model_type") != "internlm2":
        content = {**orjson.loads((tiny_rm / "config.json").read_bytes()), **content}
    model = with_config(tiny_rm, tmp_path / "rm", content)
    assert cli.run(["score", str(candidates), "-m", str(model), "--device", "cpu"]) in (2, 4)
    err = capfd.readouterr().err
    assert f"polarctl: {model}" in err or "polarctl: config.json: InternLM2" in err


# -- option files ---------------------------------------------------------------------------------

BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{new}: &{new} [{','.join([f'*{old}'] * 9)}]\n"
    for old, new in zip("abcdef", "bcdefg", strict=True)
)
YAMLS = [
    "seed: " + "[" * 5000,
    "seed: " + "[" * 5000 + "]" * 5000,
    "seed: " + "9" * 6001,
    "seed: 2020-99-99",
    "seed: !!timestamp x",
    "seed: !!bool x",
    "seed: !!int ''",
    "? [a, b]\n: 1",
    "? {a: b}\n: 1",
    BOMB,
    BOMB.replace("g:", "seed:"),
    BOMB.replace("g:", "input:"),
    BOMB.replace("g: ", "?").replace("\n?", "\n? "),
    'input: "a\\0b"',
    'input: ["\\ud800"]',
    "seed: {a: 1}",
    "input: [[a]]",
    "# " + "x" * (1 << 20),
]


@pytest.mark.parametrize("text", YAMLS, ids=range(len(YAMLS)))
def test_an_option_file_that_is_none_is_one_short_line(tmp_path, capfd, text):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    assert cli.run(["convert", "--config", str(path)]) == 2
    err = capfd.readouterr().err
    assert str(path) in err and len(err) < 1000
