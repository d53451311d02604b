"""What `--force` replaces, and when: real commands, refused, killed and starved of room."""

import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from tiny import with_options

from polarctl.cli import run

PROGRAM = [sys.executable, "-m", "polarctl"]
QUIET = {**os.environ, "OMP_NUM_THREADS": "1"}


def tree(folder):
    """Every file below a folder with its bytes, but for locks."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def triples(path, count=24):
    draw = random.Random(0)
    rows = []
    for number in range(count):
        right, wrong = draw.sample(["yes", "no", "maybe so", "who knows"], 2)
        rows.append(
            {"prompt": f"q{number}", "reference": right, "chosen": right, "rejected": wrong}
        )
    return write(path, rows)


@pytest.fixture(scope="module")
def reward_model(tiny_lm, tmp_path_factory):
    """A complete reward model of `pretrain`, and its data."""
    folder = tmp_path_factory.mktemp("trained")
    assert (
        run(pretrain(triples(folder / "t.jsonl"), tiny_lm, folder / "rm", "--max-steps", "2")) == 0
    )
    return folder / "rm"


def pretrain(data, model, out, *more):
    base = ["pretrain", str(data), "-m", str(model), "-o", str(out), "--device", "cpu", "-q"]
    return with_options([*base, "--lr", "1e-3", "--batch-size", "4", "--save-steps", "1"], more)


# -- what is never replaced ------------------------------------------------------------------------


@pytest.mark.parametrize("force", [[], ["--force"]])
@pytest.mark.parametrize(
    "case", ["model", "model by a link", "parent", "tokenizer", "input", "foreign", "extra file"]
)
def test_a_training_stage_leaves_inputs_models_and_files_of_others(
    case, force, reward_model, tmp_path, capfd
):
    rm = tmp_path / "proj" / "rm"
    shutil.copytree(reward_model, rm)
    data = triples(tmp_path / "data" / "t.jsonl")
    model, out, more = rm, rm, []
    if case == "model by a link":
        model = tmp_path / "link"
        model.symlink_to(rm)
    elif case == "parent":
        out = tmp_path / "proj"
        shutil.copy(rm / "manifest.json", out)
    elif case == "tokenizer":
        model, more = reward_model, ["--tokenizer", str(rm)]
    elif case == "input":
        model, data = reward_model, triples(rm / "t.jsonl")
    elif case == "foreign":
        model, out = reward_model, tmp_path / "mine"
        write(out / "notes.txt", [1])
    elif case == "extra file":
        model = reward_model
        (rm / "notes.txt").write_text("precious")
    before = tree(tmp_path)
    arguments = ["finetune", str(data), "-m", str(model), "-o", str(out), "--lr", "1e-3"]
    assert run([*arguments, "--device", "cpu", "--max-steps", "1", *more, *force]) == 2
    said = capfd.readouterr().err
    if case == "extra file" and not force:
        assert "complete already" in said
    else:
        assert "is not replaced" in said
    assert "Traceback" not in said
    assert tree(tmp_path) == before


def test_convert_leaves_the_checkpoint_that_it_reads(reward_model, tmp_path, capfd):
    rm = tmp_path / "proj" / "rm"
    shutil.copytree(reward_model, rm)
    foreign = tmp_path / "mine"
    write(foreign / "notes.txt", [1])
    before = tree(tmp_path)
    for target in (rm, rm.parent, foreign):
        arguments = ["convert", "checkpoint", str(rm), "--to", "internlm2", "-o", str(target)]
        assert run([*arguments, "--force"]) == 2
        assert "is not replaced" in capfd.readouterr().err
    assert tree(tmp_path) == before


def test_quickstart_leaves_folders_of_others_and_a_dry_run_writes_nothing(tmp_path, capfd):
    foreign = tmp_path / "mine"
    write(foreign / "pool.jsonl", [1])
    for more in ([], ["--force"]):
        assert run(["quickstart", "--fast", "-o", str(foreign), *more]) == 2
        assert "is not replaced" in capfd.readouterr().err
    before = tree(tmp_path)
    assert run(["quickstart", "--fast", "-o", str(tmp_path / "new"), "--dry-run"]) == 0
    assert tree(tmp_path) == before and not (tmp_path / "new").exists()


def test_eval_writes_no_report_over_files_of_others(tmp_path, capfd):
    row = {"prompt": "q", "reference": "a", "chosen": "a", "rejected": "b", "rewards": [1, 0]}
    scores = write(tmp_path / "s.jsonl", [row])
    mine = write(tmp_path / "r" / "report.html", ["precious"])
    before = tree(tmp_path)
    for more in ([], ["-o", str(tmp_path / "verdicts.jsonl"), "--force"]):
        assert run(["eval", str(scores), "--report", str(tmp_path / "r"), *more]) == 2
        assert f"{mine}: is not replaced" in capfd.readouterr().err
    assert tree(tmp_path) == before
    mine.unlink()
    for _ in range(2):  # a report of its own is
        assert run(["eval", str(scores), "--report", str(tmp_path / "r")]) == 0


def test_a_manifest_is_not_written_over_a_file_of_the_user(tmp_path, capfd):
    source = triples(tmp_path / "t.jsonl")
    mine = write(tmp_path / "mine.json", ["precious"])
    arguments = ["convert", str(source), "-o", str(tmp_path / "o.jsonl"), "--manifest", str(mine)]
    assert run([*arguments, "--force"]) == 2
    assert "it is no manifest" in capfd.readouterr().err
    assert mine.read_text() == '"precious"\n' and not (tmp_path / "o.jsonl").exists()


# -- the old or the new ----------------------------------------------------------------------------


def kill_after(arguments, seconds, **more):
    """Start a command, SIGKILL it after some seconds; None when it was killed."""
    child = subprocess.Popen(
        [*PROGRAM, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        env=QUIET,
        **more,
    )
    try:
        return child.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        return None


@pytest.mark.slow
def test_a_killed_force_leaves_the_old_file_or_the_new(tmp_path):
    source = triples(tmp_path / "t.jsonl", 20_000)
    out, link = tmp_path / "o.jsonl", tmp_path / "link.jsonl"
    link.symlink_to(out)
    plain = ["convert", str(source), "-q", "-o", str(link)]
    forced = [*plain, "--to", "candidates", "--force"]
    assert run(plain) == 0
    old = out.read_bytes()
    assert run([*plain[:-1], str(tmp_path / "wanted.jsonl"), "--to", "candidates"]) == 0
    wanted = (tmp_path / "wanted.jsonl").read_bytes()
    draw, killed = random.Random(8), 0
    start = time.monotonic()
    assert kill_after(forced, 60) == 0
    whole_s = time.monotonic() - start
    assert out.read_bytes() == wanted
    for _ in range(8):
        out.write_bytes(old)
        killed += kill_after(forced, draw.uniform(0.3, 1.0) * whole_s) is None
        assert out.read_bytes() in (old, wanted)
        assert json.loads(Path(f"{link}.manifest.json").read_bytes())["stage"] == "convert"
    assert killed >= 3
    assert run(forced) == 0
    assert out.read_bytes() == wanted and link.is_symlink()
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".polarctl")]
    assert run(forced[:-1]) == 0  # complete already


def test_a_kill_while_files_change_places_is_made_good(tmp_path):
    """The last renames one by one: whatever is left, a later command does the rest."""
    source = triples(tmp_path / "t.jsonl")
    for steps in range(3):
        folder = tmp_path / str(steps)
        folder.mkdir()
        out, bad = folder / "o.jsonl", folder / "bad.jsonl"
        plain = ["convert", str(source), "-q", "-o", str(out), "--rejects", str(bad)]
        assert run(plain) == 0
        program = f"""
            import os, signal, sys
            from polarctl import cli
            from polarctl.storage import journal
            real, count = os.replace, []
            def replace(new, old):
                if ".polarctl-next." in str(new) and "manifest.json.tmp" not in str(new):
                    if len(count) == {steps}:
                        os.kill(os.getpid(), signal.SIGKILL)
                    count.append(new)
                real(new, old)
            journal.os.replace = replace
            cli.run(sys.argv[1:])
        """
        forced = [*plain, "--to", "candidates", "--force"]
        child = subprocess.run([sys.executable, "-c", textwrap.dedent(program), *forced])
        assert child.returncode == -signal.SIGKILL
        before = out.read_bytes()
        assert run(forced) == 0
        assert json.loads(out.read_bytes().splitlines()[0])["candidates"]
        assert (b"candidates" in before) == (steps > 1)  # rejects, file, manifest
        assert sorted(path.name for path in folder.iterdir()) == [
            "bad.jsonl",
            "o.jsonl",
            "o.jsonl.manifest.json",
        ]


def test_two_folders_change_places_in_one_step(tmp_path):
    program = """
        import os, sys
        from pathlib import Path
        from polarctl.storage.replace import exchange
        new, old = map(Path, sys.argv[1:])
        while True:
            exchange(new, old)
    """
    one, two = tmp_path / "one", tmp_path / "two"
    for place, text in ((one, "1"), (two, "2")):
        place.mkdir()
        for number in range(3):
            (place / f"{number}").write_text(text)
    draw = random.Random(3)
    for _ in range(10):
        arguments = [sys.executable, "-c", textwrap.dedent(program), str(one), str(two)]
        child = subprocess.Popen(arguments)
        time.sleep(0.15 + draw.uniform(0, 0.02))
        child.kill()
        child.wait()
        seen = {place: {path.read_text() for path in place.iterdir()} for place in (one, two)}
        assert sorted(map(sorted, seen.values())) == [["1"], ["2"]]


def lines(path):
    try:
        return path.read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def is_whole(folder):
    """Whether every file of a folder is the one in its manifest."""
    outputs = json.loads((folder / "manifest.json").read_bytes())["outputs"]
    return all(
        hashlib.sha256((folder / name).read_bytes()).hexdigest() == facts["sha256"]
        for name, facts in outputs.items()
    )


@pytest.mark.slow
def test_a_killed_force_leaves_the_old_model_or_the_new(tiny_lm, tmp_path):
    data, out = triples(tmp_path / "t.jsonl"), tmp_path / "rm"
    forced = pretrain(data, tiny_lm, out, "--max-steps", "12", "--force")
    assert run(pretrain(data, tiny_lm, tmp_path / "wanted", "--max-steps", "12")) == 0
    assert run(pretrain(data, tiny_lm, out, "--max-steps", "1")) == 0
    wanted = (tmp_path / "wanted/model.safetensors").read_bytes()
    hidden = tmp_path / ".polarctl-next.rm" / "metrics.jsonl"
    for steps in (1, 5, 9, 12):  # a kill by its progress: how fast the machine is says nothing
        child = subprocess.Popen([*PROGRAM, *forced], env=QUIET, start_new_session=True)
        while child.poll() is None and lines(hidden) < steps:
            time.sleep(0.002)
        killed = child.poll() is None
        os.killpg(child.pid, signal.SIGKILL) if killed else None
        child.wait()
        assert is_whole(out)
        assert killed or steps == 12
    assert run(forced) == 0
    assert is_whole(out) and (out / "model.safetensors").read_bytes() == wanted
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rm", "t.jsonl", "wanted"]


def test_a_force_run_goes_on_and_a_failed_one_costs_nothing(tiny_lm, tmp_path):
    data, out = triples(tmp_path / "t.jsonl"), tmp_path / "rm"
    assert run(pretrain(data, tiny_lm, out, "--max-steps", "1")) == 0
    before = tree(out)
    forced = pretrain(data, tiny_lm, out, "--max-steps", "40", "--force")
    child = subprocess.Popen([*PROGRAM, *forced], env=QUIET)
    hidden = tmp_path / ".polarctl-next.rm" / "metrics.jsonl"
    while child.poll() is None and not (hidden.exists() and hidden.read_bytes().count(b"\n") > 3):
        time.sleep(0.005)
    child.send_signal(signal.SIGINT)
    assert child.wait() == 130
    assert tree(out) == before
    steps = hidden.read_bytes().count(b"\n")
    assert run([word for word in forced if word != "-q"]) == 0
    assert not hidden.exists() and is_whole(out)
    assert 3 < steps < 40
    assert (out / "metrics.jsonl").read_bytes().count(b"\n") == 40


def test_force_replaces_a_converted_checkpoint_and_a_parquet_file(reward_model, tmp_path):
    out = tmp_path / "x"
    arguments = ["convert", "checkpoint", str(reward_model), "--to", "internlm2", "-o", str(out)]
    assert run(arguments) == 0
    assert run(arguments) == 2
    before = out.stat().st_ino
    assert run([*arguments, "--force"]) == 0 and is_whole(out) and out.stat().st_ino != before
    pytest.importorskip("pyarrow")
    table = tmp_path / "t.parquet"
    arguments = ["convert", str(reward_model.parent / "t.jsonl"), "--to", "verl", "-o", str(table)]
    assert run(arguments) == 0
    assert run([*arguments, "--force"]) == 0
    Path(f"{table}.manifest.json").unlink()
    assert run([*arguments, "--force"]) == 2  # nothing says whose it is
    assert sorted(path.name for path in tmp_path.iterdir()) == ["t.parquet", "x"]


# -- stopped by hand, or by a full disk ------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("gpus", [1, 2])
def test_ctrl_c_saves_the_step_in_hand(gpus, tiny_lm, tmp_path):
    data, out, whole = triples(tmp_path / "t.jsonl"), tmp_path / "rm", tmp_path / "whole"
    more = ["--max-steps", "40", "--save-steps", "1000"]
    if gpus > 1:
        more += ["--gpus", str(gpus)]
    arguments = pretrain(data, tiny_lm, out, *more)
    child = subprocess.Popen(
        [*PROGRAM, *arguments], stderr=subprocess.PIPE, text=True, env=QUIET, start_new_session=True
    )
    metrics = out / "metrics.jsonl"
    while child.poll() is None and not (metrics.exists() and metrics.stat().st_size):
        time.sleep(0.002)
    os.killpg(child.pid, signal.SIGINT)  # as a terminal does
    _, errors = child.communicate(timeout=120)
    assert child.returncode == 130, errors
    assert "polarctl: stopped by Ctrl-C" in errors and "Traceback" not in errors
    (saved,) = (out / "checkpoints").glob("step-*")
    step = int(saved.name.rpartition("-")[2])
    assert 0 < step < 40 and metrics.read_bytes().count(b"\n") == step
    for target in (out, whole):
        done = subprocess.run([*PROGRAM, *pretrain(data, tiny_lm, target, *more)], env=QUIET)
        assert done.returncode == 0
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_a_full_disk_ends_training_with_one_line_and_the_last_checkpoint(
    reward_model, tiny_lm, tmp_path
):
    data, out, whole = triples(tmp_path / "t.jsonl"), tmp_path / "rm", tmp_path / "whole"
    arguments = ["finetune", str(data), "-m", str(reward_model), "--lr", "1e-3", "-q"]
    arguments += ["--device", "cpu", "--batch-size", "4", "--save-steps", "1", "--max-steps", "60"]
    assert run([*arguments, "-o", str(whole)]) == 0
    child = subprocess.Popen(
        [*PROGRAM, *arguments, "-o", str(out)], env=QUIET, stderr=subprocess.PIPE, text=True
    )
    while not list((out / "checkpoints").glob("*2/checkpoint.json")):
        time.sleep(0.002)
    # From now on no file can be larger: the next save of the optimiser fails in the middle.
    resource.prlimit(child.pid, resource.RLIMIT_FSIZE, (50_000, 50_000))
    errors = child.communicate()[1]
    assert child.returncode == 1
    said = [line for line in errors.splitlines() if line]
    assert said == [
        "polarctl: cannot write: File too large",
        "hint: make room; the same command goes on from here",
    ]
    kept = [path for path in (out / "checkpoints").glob("step-*")]
    assert kept and all((path / "checkpoint.json").exists() for path in kept)
    assert run([*arguments, "-o", str(out)]) == 0
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


# -- checks that are made again --------------------------------------------------------------------


def test_eval_exits_5_each_time_and_its_own_verdicts_are_no_input(tmp_path, capfd):
    row = {"prompt": "q", "reference": "a", "chosen": "a", "rejected": "b"}
    scores = write(tmp_path / "s.jsonl", [{**row, "rewards": [1, 0]}, {**row, "rewards": [0, 1]}])
    out = tmp_path / "v.jsonl"
    arguments = ["eval", str(scores), "-o", str(out), "--min-accuracy"]
    for _ in range(3):
        assert run([*arguments, "0.9"]) == 5
        assert "accuracy 0.5000 is below 0.9" in capfd.readouterr().err
    assert run([*arguments, "0.5"]) == 0  # the figures are the same ones
    capfd.readouterr()
    assert run(["eval", str(out)]) == 3
    assert f"polarctl: {out}:1: has no candidates" in capfd.readouterr().err


@pytest.mark.parametrize("what", ["output", "input"])
def test_complete_is_believed_of_the_same_bytes_alone(what, tmp_path, capfd):
    source, out = triples(tmp_path / "t.jsonl"), tmp_path / "o.jsonl"
    arguments = ["convert", str(source), "-o", str(out)]
    assert run(arguments) == 0
    assert run(arguments) == 0
    capfd.readouterr()
    path = {"output": out, "input": source}[what]
    times = path.stat()
    path.write_bytes(path.read_bytes().replace(b"q7", b"Q7"))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert run(arguments) == 2
    said = capfd.readouterr().err
    assert "bytes are not those in its manifest" in said or "has changed since" in said


def test_a_complete_model_is_believed_of_the_same_bytes_alone(
    reward_model, tiny_lm, tmp_path, capfd
):
    folder = tmp_path / "all"
    shutil.copytree(reward_model.parent, folder)
    arguments = pretrain(folder / "t.jsonl", tiny_lm, folder / "rm", "--max-steps", "2")
    assert run(arguments) == 0
    weights = folder / "rm/model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    capfd.readouterr()
    assert run(arguments) == 2
    assert "model.safetensors is not the one in its manifest" in capfd.readouterr().err


# -- rejects, and what no journal knows ------------------------------------------------------------


SLOW = """
    import sys, time
    from polarctl import cli
    from polarctl.storage.read import Reader
    real = Reader.parse
    def parse(self, *given, **more):
        time.sleep(0.0004)
        return real(self, *given, **more)
    Reader.parse = parse
    sys.exit(cli.run(sys.argv[1:]))
"""


def slow(arguments):
    """The program, with some time spent on each row."""
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(SLOW), *arguments],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def test_two_runs_never_share_a_rejects_file(tmp_path, capfd):
    good = {"prompt": "q", "reference": "a", "chosen": "a", "rejected": "b"}
    rows = [good if number % 5 else {"prompt": number} for number in range(6000)]
    source, bad = write(tmp_path / "t.jsonl", rows), tmp_path / "bad.jsonl"

    def shard(number):
        return [
            *["convert", str(source), "--shard", f"{number}/2", "-q", "--rejects", str(bad)],
            *["-o", str(tmp_path / f"{number}.jsonl")],
        ]

    first = slow(shard(0))
    while not bad.exists():
        assert first.poll() is None, first.communicate()[1]
        time.sleep(0.005)
    start = time.monotonic()
    assert run(shard(1)) == 2
    assert time.monotonic() - start < 2
    assert "another process is writing it" in capfd.readouterr().err
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    assert run(shard(1)) == 2  # nor while it can go on
    assert "unfinished run that writes" in capfd.readouterr().err
    assert run([*shard(1), "--force"]) == 2
    assert run(shard(0)) == 0
    assert run(shard(1)) == 2 and "exists" in capfd.readouterr().err
    lines = bad.read_bytes().splitlines()
    assert len({json.loads(line)["where"] for line in lines}) == len(lines)
    # Windows 0, 2 and 4 of 1,024 rows; every fifth is bad, and the last one counts from 4,096.
    assert len(lines) == sum(row != good for i, row in enumerate(rows) if i // 1024 % 2 == 0)


@pytest.mark.parametrize("force", [[], ["--force"]])
@pytest.mark.parametrize("journal", ["empty", "of a run killed before its first unit"])
def test_what_no_journal_knows_is_not_cut(journal, force, tmp_path, capfd):
    source, out = triples(tmp_path / "t.jsonl", 3000), tmp_path / "o.jsonl"
    arguments = ["convert", str(source), "-q", "-o", str(out)]
    if journal == "empty":
        Path(f"{out}.journal").touch()
    else:
        child = slow(arguments)
        while not Path(f"{out}.journal").exists():
            time.sleep(0.002)
        os.killpg(child.pid, signal.SIGKILL)
        child.communicate()
        assert not out.exists()
    out.write_text("precious\n")
    assert run([*arguments, *force]) == 2
    assert "it holds what its journal does not know" in capfd.readouterr().err
    assert out.read_text() == "precious\n"
    out.unlink()
    assert run(arguments) == 0 and out.read_bytes().count(b"\n") == 3000


def test_rejects_of_training_are_kept_as_those_of_other_stages_are(tiny_lm, tmp_path, capfd):
    good = triples(tmp_path / "t.jsonl")
    data = tmp_path / "mixed.jsonl"
    data.write_text(good.read_text() + '{"prompt": "only"}\n')
    bad, out = tmp_path / "bad.jsonl", tmp_path / "rm"
    arguments = pretrain(data, tiny_lm, out, "--max-steps", "40", "--rejects", str(bad))
    child = subprocess.Popen([*PROGRAM, *arguments], env=QUIET, start_new_session=True)
    metrics = out / "metrics.jsonl"
    while child.poll() is None and not (metrics.exists() and metrics.stat().st_size):
        time.sleep(0.002)
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    rejected = bad.read_bytes()
    assert json.loads(rejected)["where"] == f"{data}:25"
    other = pretrain(data, tiny_lm, tmp_path / "other", "--max-steps", "1", "--rejects", str(bad))
    assert run(other) == 2 and "unfinished run that writes" in capfd.readouterr().err
    bad.write_text("precious\n")  # begun or not: it is not ours
    assert run(arguments) == 2 and "no rejected records" in capfd.readouterr().err
    assert bad.read_text() == "precious\n"
    bad.unlink()
    assert run(arguments) == 0 and bad.read_bytes() == rejected
    assert run(other) == 2 and "exists" in capfd.readouterr().err
