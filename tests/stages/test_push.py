"""`polarctl push` against a Hub on the loopback interface, through the real program."""

import gzip
import json
import os
import re
import struct
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from polarctl import cli
from polarctl.storage.manifest import folder_files, sha256
from tests.hub.secret_kinds import kinds
from tests.hub_server import TOKEN, HubServer, Repo

PROGRAM = [sys.executable, "-c", "from polarctl.cli import main; main()"]
POLAR = {
    "separator": "<|reward|>",
    "reward_token": "[UNUSED_TOKEN_130]",
    "max_length": 512,
    "max_response_length": 128,
    "cut_side": "right",
}
TRIPLE = {"prompt": "2+2?", "reference": "4", "chosen": "It is 4.", "rejected": "5", "extra": 1}
SECRET = "hf_" + "ZqkYwbTnRx" * 3 + "PmLd"
KEY = kinds()["rsa-key"]


@pytest.fixture
def hub():
    with HubServer() as server:
        yield server


@pytest.fixture
def push(hub, tmp_path):
    """Run `polarctl push` with the server as its Hub; no output may show the token."""

    def run(*arguments, token=TOKEN, **environment):
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "POLARCTL_"))}
        done = subprocess.run(
            [*PROGRAM, "push", *map(str, arguments)],
            env={
                **inherited,
                "HF_ENDPOINT": hub.url,
                "HF_HOME": str(tmp_path / "hf"),
                "HF_HUB_DISABLE_XET": "1",  # the loopback server has no deduplicating storage
                "NO_PROXY": "127.0.0.1",
                **({"HF_TOKEN": token} if token else {}),
                **environment,
            },
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert "Traceback" not in done.stderr, done.stderr
        assert TOKEN not in done.stdout + done.stderr
        return done

    return run


@dataclass
class Done:
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def push_here(hub, monkeypatch, capfd):
    """The same within this process: faster, for what needs no process of its own."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)

    def run(*arguments):
        status = cli.run(["push", *map(str, arguments)])
        out, err = capfd.readouterr()
        assert TOKEN not in out + err
        return Done(status, out, err)

    return run


def write_weights(path, *names):
    """A safetensors file with one number under each name."""
    spans = enumerate(names)
    header = {
        n: {"dtype": "F32", "shape": [1], "data_offsets": [4 * i, 4 * i + 4]} for i, n in spans
    }
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + b"\0\0\x80?" * len(names))


def write_manifest(folder, **fields):
    manifest = {
        "schema_version": 1,
        "stage": "pretrain",
        "version": "0.1.0",
        "config": {"model": "/home/alice/models/base", "lr": 1e-5, "output": str(folder)},
        "inputs": [{"path": "/data/alice/triples.jsonl", "bytes": 1234}],
        "outputs": folder_files(folder),
        "counts": {"triples": 7},
        "choices": {"device": {"value": "cpu", "reason": "no GPU"}},
        "environment": {"python": "3.11.7", "host": "alice-box-7"},
        **fields,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "my-rm"
    folder.mkdir()
    write_weights(folder / "model.safetensors", "score.weight")
    config = {"architectures": ["LlamaForSequenceClassification"], "polar": POLAR}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "metrics.jsonl").write_text(
        '{"step": 1, "loss": 0.69, "val/accuracy": 0.5}\n{"step": 2, "loss": 0.25}\n'
    )
    write_manifest(folder)
    return folder


def write_data(path, records=3, **fields):
    lines = (json.dumps(TRIPLE) + "\n").encode() * records
    path.write_bytes(gzip.compress(lines, mtime=0) if path.suffix == ".gz" else lines)
    entry = {"sha256": sha256(path), "bytes": path.stat().st_size, "path": str(path)}
    manifest = {
        "schema_version": 1,
        "stage": "pair",
        "version": "0.1.0",
        "config": {"seed": 0},
        "inputs": [{"path": "-", "bytes": None}],
        "outputs": {path.name: {**entry, "records": records}},
        "counts": {"records": records},
        "choices": {},
        "environment": {"host": "alice-box-7"},
        **fields,
    }
    path.with_name(f"{path.name}.manifest.json").write_text(json.dumps(manifest))
    return path


def front_matter(card):
    return yaml.safe_load(card.split("---\n")[1])


# -- what arrives --------------------------------------------------------------------------------


def test_a_checkpoint_arrives_whole_private_and_without_traces_of_this_machine(
    hub, push, push_here, checkpoint
):
    for name in ("optimizer.pt", "pytorch_model.bin", "modeling.py", ".lock"):
        (checkpoint / name).write_text("x")
    (checkpoint / "checkpoint-10").mkdir()
    done = push(checkpoint, "me/rm", "--license", "apache-2.0", "--dataset", "me/triples")
    repo = hub.repos["me/rm"]
    assert (done.returncode, repo.private, len(repo.commits)) == (0, True, 1), done.stderr
    assert done.stdout == f"{hub.url}/me/rm/commit/{repo.head}\n"
    files = repo.files()
    same = {"config.json", "tokenizer.json", "metrics.jsonl", "model.safetensors"}
    assert set(files) == same | {"README.md", "manifest.json"}
    for name in same:
        assert files[name] == (checkpoint / name).read_bytes()
    assert ("POST", "/lfs/verify") in hub.requests  # the weights went as a large file
    assert "left out: optimizer.pt (a pickle can run code when it is loaded)" in done.stderr
    assert "left out: checkpoint-10/ (a folder)" in done.stderr
    text = (files["README.md"] + files["manifest.json"]).decode()
    for trace in (TOKEN, "alice", str(checkpoint.parent), "/data"):
        assert trace not in text
    card = files["README.md"].decode()
    front = front_matter(card)
    assert front["pipeline_tag"] == "text-classification"
    assert (front["license"], front["datasets"]) == ("apache-2.0", ["me/triples"])
    assert "base_model" not in front  # a local folder is no model of the Hub
    assert "| `val/accuracy` | 0.5 |" in card and "| Read | `triples.jsonl`, 1,234 bytes |" in card

    # A card that was edited on the Hub stays; one that push wrote is written anew.
    push_here(checkpoint, "me/rm", "--license", "mit")
    assert front_matter(files["README.md"].decode())["license"] == "mit"
    files["README.md"] = b"# By hand\n"
    done = push_here(checkpoint, "me/rm")
    assert files["README.md"] == b"# By hand\n"
    assert "has these files already; nothing to do" in done.stderr
    assert done.stdout == f"{hub.url}/me/rm/commit/{repo.head}\n" and len(repo.commits) == 2


def test_a_data_file_arrives_on_a_branch_of_a_public_repository_of_ones_own(hub, push, tmp_path):
    counts = {"records": 1500, "rejects": 3, "prompts with one policy": 7}
    data = write_data(tmp_path / "triples.jsonl.gz", records=1500, counts=counts)
    done = push(data, "triples", "--public", "--revision", "v2", "--message", "New triples")
    repo = hub.repos["me/triples"]
    assert (done.returncode, repo.kind, repo.private) == (0, "dataset", False), done.stderr
    assert done.stdout == f"{hub.url}/datasets/me/triples/commit/{repo.head}\n"
    assert repo.commits[0]["summary"] == "New triples" and repo.files("main") == {}
    files = repo.files("v2")
    plot = f"plots/{data.name}.texts.png"
    assert files.keys() == {data.name, f"{data.name}.manifest.json", "README.md", plot}
    assert files[data.name] == data.read_bytes() and files[plot].startswith(b"\x89PNG")
    assert b"alice" not in files[f"{data.name}.manifest.json"]
    card = files["README.md"].decode()
    assert front_matter(card)["size_categories"] == ["1K<n<10K"]
    assert front_matter(card)["configs"] == [{"config_name": "triple", "data_files": [data.name]}]
    assert f"| 1,500 | {data.stat().st_size:,} | `{sha256(data)}` |" in card
    assert "| `extra` | Passed through from the source. |" in card
    assert f"](<{plot}>)" in card
    assert "| prompts with one policy | 7 |" in card and "| bad rows of the input | 3 |" in card


def test_what_arrives_as_parquet_is_read_by_datasets_as_it_was(
    hub, push_here, tmp_path, monkeypatch
):
    """Through the card's front matter alone, by the library that people use."""
    import datasets

    messages = [{"role": "user", "content": "2+2?"}]
    rows = [
        {**TRIPLE, "policy": "a", "rejected_policy": "b", "margin": 1, "mine": {}},
        {**TRIPLE, "policy": "b", "rejected_policy": "a", "margin": 0.5, "prompt": messages},
        {**TRIPLE, "policy": "a", "rejected_policy": "b", "negatives": ["6", messages], "mine": 7},
    ]
    del rows[0]["extra"]
    held = [{**TRIPLE, "policy": "a", "rejected_policy": "b", "id": "h"}]
    made = {"prompt": "Go", "policy": "b", "num_tokens": 9, "finish_reason": "length"}
    wrote = [
        {**made, "output": "on.", "cleaned": ["loop"]},
        {**made, "output": "farther.", "cleaned": [], "num_tokens": 4},
    ]
    folder = tmp_path / "data"
    folder.mkdir()
    for name, records in (("train", rows), ("held-out", held), ("written", wrote)):
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (folder / f"{name}.jsonl").write_text(lines)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    done = push_here(folder, "me/d", "--force", "--parquet")
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.glob("polarctl-push-*"))
    there = tmp_path / "there"
    for name, content in hub.repos["me/d"].files().items():
        (there / name).parent.mkdir(parents=True, exist_ok=True)
        (there / name).write_bytes(content)

    def load(kind):
        found = datasets.load_dataset(str(there), kind, cache_dir=str(tmp_path / "cache"))
        return {split: [dict(row) for row in one] for split, one in found.items()}

    assert datasets.get_dataset_config_names(str(there)) == ["triple", "trajectory"]
    found = load("triple")
    names = {name for row in [*rows, *held] for name in row}
    expected = {
        "train": [{name: row.get(name) for name in names} for row in rows],
        "validation": [{name: row.get(name) for name in names} for row in held],
    }
    assert found == expected
    assert load("trajectory") == {"train": wrote}
    info = datasets.load_dataset_builder(str(there), "triple").info
    assert {s: x.num_examples for s, x in info.splits.items()} == {"train": 3, "validation": 1}

    card = (there / "README.md").read_text()
    assert "| `b` | 2 | 13 | 2 | 1 |" in card  # records, tokens, cut by the limit, loops
    assert "| `a` | 2 | 1 |\n| `b` | 1 | 2 |" in card  # as reference, as rejected
    assert "| `output` | 11 | 3 | 8 | 8 |" in card  # characters: `on.` and `farther.`


def test_an_existing_public_repository_stays_public_with_a_warning_and_ones_own_card_is_kept(
    hub, push_here, checkpoint
):
    hub.repos["me/rm"] = Repo("model", private=False)
    (checkpoint / "README.md").write_text("# Mine\n")
    done = push_here(checkpoint, "me/rm")
    assert done.returncode == 0 and hub.repos["me/rm"].private is False
    assert "me/rm is public already: these files will be public too" in done.stderr
    assert hub.repos["me/rm"].files()["README.md"] == b"# Mine\n"


def test_a_file_that_the_repository_ignores_is_an_error(hub, push_here, checkpoint):
    hub.repos["me/rm"] = Repo("model", private=True, ignored={"model.safetensors"})
    done = push_here(checkpoint, "me/rm")
    assert done.returncode == 1 and done.stdout == ""
    assert "me/rm: the Hub did not take model.safetensors" in done.stderr


# -- what goes wrong -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fail", "status", "message"),
    [
        ({"POST /api/repos/create": (403, "no write access")}, 4, "the token may not write there"),
        (
            {"POST .*/commit/main": (500, f"broken\n by \x1b[2J{TOKEN}")},
            1,
            r"500: broken by \x1b[2J***",
        ),
        ({"PUT /lfs/.*": (400, "too large")}, 1, "me/rm: the Hub answers 400: too large"),
        ({"POST /api/validate-yaml": (400, "bad")}, 2, "metadata in README.md"),
    ],
)
def test_a_hub_that_says_no_is_one_line_and_no_commit(
    hub, push_here, checkpoint, fail, status, message
):
    hub.fail = fail
    done = push_here(checkpoint, "me/rm", "--quiet")
    assert (done.returncode, done.stdout, hub.commits) == (status, "", 0), done.stderr
    first, *hint = done.stderr.splitlines()
    assert first.startswith("polarctl: ") and message in first
    assert len(hint) < 2 and all(line.startswith("hint: ") for line in hint)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"token": "hf_wrong"}, "the Hub does not accept the token: Invalid credentials"),
        ({"HF_ENDPOINT": "http://127.0.0.1:9"}, "the Hub cannot be reached: "),
        ({"HF_HUB_OFFLINE": "1"}, "the Hub is switched off"),
    ],
)
def test_a_hub_that_is_not_there_for_the_user_is_status_4(
    hub, push, checkpoint, environment, message
):
    done = push(checkpoint, "me/rm", "--quiet", **environment)
    assert (done.returncode, done.stdout, hub.commits) == (4, "", 0), done.stderr
    first, hint = done.stderr.splitlines()
    assert first.startswith("polarctl: ") and message in first and hint.startswith("hint: ")


def test_a_dry_run_needs_no_network_and_no_token(hub, push, checkpoint):
    (checkpoint / "optimizer.pt").write_text("x")
    done = push(checkpoint, "me/rm", "--dry-run", "--verbose", token=None)
    assert (done.returncode, done.stdout, hub.requests) == (0, "", [])
    assert "model me/rm (private if new): 6 files" in done.stderr
    size = (checkpoint / "model.safetensors").stat().st_size
    assert f"  model.safetensors: {size:,} bytes" in done.stderr
    assert "optimizer.pt" in done.stderr and "AutoModelForSequenceClassification" in done.stderr


def test_nothing_is_requested_without_a_token_or_with_a_secret_in_a_file(hub, push, checkpoint):
    done = push(checkpoint, "me/rm", token=None)
    assert done.returncode == 4 and "hint: log in with `hf auth login`" in done.stderr
    (checkpoint / "README.md").write_text(f"# Model\n\nexport HF_TOKEN={SECRET}\n")
    done = push(checkpoint, "me/rm")
    assert done.returncode == 2 and SECRET not in done.stderr
    assert "README.md:3: holds a secret: huggingface-access-token, hash " in done.stderr
    assert "; nothing was uploaded" in done.stderr
    assert hub.requests == []


def test_what_is_no_secret_is_allowed_by_the_hash_in_the_message(tmp_path, capfd):
    made = kinds(9)
    rows = [{**TRIPLE, "chosen": f"a\n{made[kind]}\nb"} for kind in ("gitlab", "npm", "npm")]
    data = tmp_path / "a.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in [TRIPLE, *rows]))
    base = ["push", str(data), "me/d", "--dry-run", "--force"]
    assert cli.run(base) == 2
    err = capfd.readouterr().err
    said = re.findall(r"a\.jsonl:\d: holds a secret: [\w-]+, hash ([0-9a-f]{16})", err)
    assert [line for line in re.findall(r"a\.jsonl:(\d)", err)] == ["3", "4", "2"]
    assert len(set(said)) == 2 and "(3 places in all)" in err
    assert f"if it is no secret: --allow-secret {said[-1]}" in err
    assert made["gitlab"] not in err and made["npm"] not in err
    assert cli.run([*base, "--allow-secret", said[0]]) == 2  # the other one is still there
    err = capfd.readouterr().err
    assert "a.jsonl:2: holds" in err and "a.jsonl:3" not in err
    assert cli.run([*base, "--allow-secret", said[0], "--allow-secret", said[-1]]) == 0
    nothing = [*base, "--allow-secret", said[0], "--allow-secret", said[-1]]
    assert cli.run([*nothing, "--allow-secret", "0" * 16]) == 2
    assert "nothing has this hash" in capfd.readouterr().err
    assert cli.run([*base, "--allow-secret", made["npm"]]) == 2
    err = capfd.readouterr().err
    assert "not the hash of a place" in err and made["npm"] not in err


def test_names_of_tensors_are_searched_and_their_numbers_are_not(checkpoint, capfd):
    push = ["push", str(checkpoint), "me/rm", "--dry-run", "--force", "-q"]
    (checkpoint / "manifest.json").unlink()
    numbers = (SECRET + " " * (-len(SECRET) % 4)).encode()
    for metadata, status in (({}, 0), ({"made_with": SECRET}, 2)):
        tensor = {"dtype": "F32", "shape": [10], "data_offsets": [0, len(numbers)]}
        raw = json.dumps({"__metadata__": metadata, "score.weight": tensor}).encode()
        weights = struct.pack("<Q", len(raw)) + raw + numbers
        (checkpoint / "model.safetensors").write_bytes(weights)
        assert cli.run(push) == status
    assert "model.safetensors:1: holds a secret: huggingface" in capfd.readouterr().err


def test_without_the_package_that_looks_for_secrets_nothing_is_published(
    checkpoint, monkeypatch, capfd
):
    from polarctl.hub import secrets

    secrets._scanner.cache_clear()
    monkeypatch.setitem(sys.modules, "kingfisher_sdk", None)  # as if it were not installed
    assert cli.run(["push", str(checkpoint), "me/rm", "--dry-run"]) == 4
    first, hint = capfd.readouterr().err.splitlines()[-2:]
    assert first == "polarctl: this needs the package `kingfisher-secret-scanner`"
    assert hint == "hint: pip install 'polarctl[push]'"


# -- what is refused before any request ----------------------------------------------------------


def _replace(name, text):
    return lambda folder: (folder / name).write_text(text)


def _link(name, remove=True):
    def make(folder):
        target = folder.parent / f"outside-{name}"
        (folder / name).rename(target) if remove else target.write_text("{}")
        (folder / name).symlink_to(target)

    return make


def _truncate(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-1])


def _flip(folder):
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)


def _shards(weight_map):
    def make(folder):
        (folder / "model.safetensors").unlink()
        write_weights(folder / "model-00001-of-00002.safetensors", "a")
        index = {"weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        (folder / "manifest.json").unlink()
        write_manifest(folder)

    return make


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "manifest.json").unlink(), "is not complete: manifest.json is missing"),
        (_replace("config.json", '{"a": 1}'), "config.json: has 8 bytes, the manifest says "),
        (_flip, "model.safetensors: is not what the manifest says (SHA-256)"),
        (_truncate, "model.safetensors: is damaged"),
        (_replace("model.safetensors", "pickle"), "model.safetensors: is no safetensors file"),
        (lambda f: (f / "model.safetensors").unlink(), "no weights in safetensors format"),
        (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json: is in manifest.json but not"),
        (_replace("vocab.json", "{}"), "vocab.json: the manifest does not name it"),
        (_shards({"b": "model-00002-of-00002.safetensors"}), "which is not in the folder"),
        (_shards({"b": "../../secret.safetensors"}), "which is not in the folder"),
        (_shards({"b": "model-00001-of-00002.safetensors"}), "`b` is missing, which model."),
        (_link("config.json"), "config.json: is a link, and links are not followed"),
        (_link("manifest.json"), "manifest.json: is a link"),
        (_link("LICENSE", remove=False), "LICENSE: is a link"),
        (_replace(".env", "A=1"), ".env: looks like credentials; nothing was uploaded"),
        (_replace("id_ed25519", "x"), "id_ed25519: looks like credentials"),
        (_replace("README.md", "x" + KEY), "README.md:1: holds a secret: private-key, hash "),
        (
            _replace("README.md", "x-from-environment-x"),
            ": the value of $MY_SERVICE_API_KEY, hash ",
        ),
    ],
)
def test_a_folder_that_must_not_be_published_is_refused(
    checkpoint, change, message, monkeypatch, capfd
):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("MY_SERVICE_API_KEY", "from-environment")
    change(checkpoint)
    status = cli.run(["push", str(checkpoint), "me/rm"])
    out, err = capfd.readouterr()
    assert (status, out) == (2, ""), err
    assert message in err and "from-environment" not in err


def test_data_that_must_not_be_published_is_refused(tmp_path, capfd):
    def refused(path, *options, status=2):
        assert cli.run(["push", str(path), "me/d", "--dry-run", *options]) == status
        return capfd.readouterr().err

    data = write_data(tmp_path / "a.jsonl")
    Path(f"{data}.journal").write_text("{}\n")
    assert "is not complete" in refused(data)
    Path(f"{data}.journal").unlink()
    data.write_text(json.dumps(TRIPLE) + "\n")
    assert "bytes, the manifest says" in refused(data)
    Path(f"{data}.manifest.json").unlink()
    assert "a.jsonl.manifest.json is missing" in refused(data)
    data.write_text(json.dumps(TRIPLE) + '\n{"a": 1}\n')
    err = refused(data, "--force", status=3)
    assert "a.jsonl:2: " in err and "hint: `polarctl validate " in err
    (tmp_path / "link.jsonl").symlink_to(data)
    assert "link.jsonl: is a link" in refused(tmp_path / "link.jsonl")
    packed = tmp_path / "b.jsonl.gz"
    packed.write_bytes(gzip.compress((json.dumps({**TRIPLE, "chosen": SECRET}) + "\n").encode()))
    err = refused(packed, "--force")
    assert "b.jsonl.gz:1: holds a secret: huggingface-access-token" in err and SECRET not in err
    assert "is neither a folder nor a .jsonl file" in refused(__file__)
    assert "no such file" in refused(tmp_path / "none")
    assert cli.run(["push", str(data), "me/a/b"]) == 2
    assert "`me/a/b`: " in capfd.readouterr().err


def test_a_folder_of_data_files_is_one_data_set_with_a_config_for_each_kind(tmp_path, capfd):
    write_data(tmp_path / "a.jsonl")
    write_data(tmp_path / "b.jsonl.gz")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "2+2?"}\n')
    (tmp_path / "notes.txt").write_text("x")
    assert cli.run(["push", str(tmp_path), "me/d", "--dry-run", "--force", "-v"]) == 0
    err = capfd.readouterr().err
    assert "left out: notes.txt (not a data file)" in err and "prompts.jsonl: has no " in err
    assert [c["config_name"] for c in front_matter(err)["configs"]] == ["triple", "prompt"]
    assert "7 records for reward models" in err  # 3 + 3 + 1
