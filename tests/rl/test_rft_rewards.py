"""`rft` with other rewards than one POLAR model, by the command."""

import json
import shlex
import statistics
import sys

import orjson
import pytest
from scoring.faulty_server import FAULTS, reward_of, serving
from tiny import build_chat_rm, with_options

from polarctl import cli

GROUP, BATCH = 4, 8


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "prompts.jsonl"
    rows = [{"prompt": f"The sum {i} is", "reference": f" {i} boats"} for i in range(4)]
    path.write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
    return path


def run(prompts, policy, folder, *more):
    options = f"--max-steps 2 --batch-size {BATCH} --num-generations {GROUP} --lr 1e-3"
    options += " --max-new-tokens 6 --device cpu -q"
    words = ["rft", str(prompts), "-m", str(policy), "-o", str(folder), *options.split()]
    return cli.run(with_options(words, list(map(str, more))))


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def advantages_follow(rollouts):
    """TRL's advantages are those of `reward_normalized` within each group."""
    for first in range(0, len(rollouts), GROUP):
        group = rollouts[first : first + GROUP]
        used = [r["reward_normalized"] for r in group]
        mean, spread = statistics.fmean(used), statistics.stdev(used)
        for record in group:
            wanted = (record["reward_normalized"] - mean) / (spread + 1e-4)
            assert record["advantage"] == pytest.approx(wanted, abs=2e-3)


def test_a_sum_of_rewards_is_logged_by_its_parts(tiny_lm, tiny_rm, prompts, tmp_path):
    options = "--reward polar --reward length:9 --reward regex:[aeiou] --normalize polar-7b "
    options += "--reward-weights 2 --reward-weights 0.5 --reward-weights -1 --overlong-buffer 4"
    folder = tmp_path / "out"
    assert run(prompts, tiny_lm, folder, "--reward-model", tiny_rm, *options.split()) == 0
    rollouts = lines(folder / "rollouts.jsonl")
    for r in rollouts:
        parts = r["components"]
        assert set(parts) == {"polar", "length:9", "regex:[aeiou]", "overlong"}
        assert parts["length:9"] == (len(r["output"]) <= 9)
        assert parts["regex:[aeiou]"] == any(letter in r["output"] for letter in "aeiou")
        # 6 tokens at most, the last 4 of them are the buffer
        assert parts["overlong"] == -max(0, r["num_tokens"] - 2) / 4
        rest = 0.5 * parts["length:9"] - parts["regex:[aeiou]"] + parts["overlong"]
        assert r["reward"] == pytest.approx(2 * parts["polar"] + rest)
        scaled = (parts["polar"] + 5) / 10
        assert r["reward_normalized"] == pytest.approx(2 * scaled + rest)
    assert len({r["components"]["length:9"] for r in rollouts}) == 2
    advantages_follow(rollouts)
    for entry in lines(folder / "metrics.jsonl"):
        mine = [r["components"] for r in rollouts if r["step"] == entry["step"]]
        for name in mine[0]:
            wanted = statistics.fmean(parts[name] for parts in mine)
            assert entry[f"reward/{name}"] == pytest.approx(wanted)
        assert 0 < entry["distinct_2"] <= 1 and 0 < entry["distinct_1"] <= 1
    scored = tmp_path / "scored.jsonl"
    source = str(folder / "rollouts.jsonl")
    options = ["-m", str(tiny_rm), "--reward-floor", "-20", "-o", str(scored), "-q"]
    assert cli.run(["score", source, *options]) == 0
    ours = [r["components"]["polar"] for r in rollouts]
    assert [r["reward"] for r in lines(scored)] == pytest.approx(ours, abs=1e-5)


def test_a_gate_asks_the_model_only_where_there_is_no_truth(tiny_lm, tiny_rm, tmp_path):
    path, folder = tmp_path / "p.jsonl", tmp_path / "out"
    rows = [
        {"prompt": "The sea", "wanted": ["a", "t"]},
        {"prompt": "The boats", "reference": " lay"},
    ]
    path.write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
    options = "--reward regex:@wanted --reward polar --reward length:9 --combine gate".split()
    assert run(path, tiny_lm, folder, "--reward-model", tiny_rm, *options) == 0
    rollouts = lines(folder / "rollouts.jsonl")
    for r in rollouts:
        parts = r["components"]
        if "wanted" in r:
            truth = any(letter in r["output"] for letter in "at")
            assert (parts["regex:@wanted"], parts["polar"]) == (truth, None)
            assert r["reward"] == truth + parts["length:9"]
        else:
            assert parts["regex:@wanted"] is None
            assert r["reward"] == pytest.approx(parts["polar"] + parts["length:9"])
    assert {"wanted" in r for r in rollouts} == {True, False}
    advantages_follow(rollouts)


def test_z_scores_are_taken_within_a_prompts_rollouts(tiny_lm, tiny_rm, prompts, tmp_path):
    folder = tmp_path / "out"
    options = "--reward polar --reward length:9 --combine zsum".split()
    assert run(prompts, tiny_lm, folder, "--reward-model", tiny_rm, *options) == 0
    rollouts = lines(folder / "rollouts.jsonl")
    for first in range(0, len(rollouts), GROUP):
        group = rollouts[first : first + GROUP]
        total = [0.0] * GROUP
        for name in ("polar", "length:9"):
            column = [r["components"][name] for r in group]
            mean, spread = statistics.fmean(column), statistics.pstdev(column)
            for place, value in enumerate(column):
                total[place] += (value - mean) / spread if spread else 0
        assert [r["reward"] for r in group] == pytest.approx(total)
    advantages_follow(rollouts)


def test_a_prompt_that_follows_itself_is_two_groups():
    """As at the border of two epochs."""
    from polarctl.records import Record
    from polarctl.rl.registry import open_rewards
    from polarctl.rl.reward_batch import Batch
    from polarctl.stages.rft import Config

    names = ("length:1", "regex:a")
    config = Config(model="m", reward=names, combine="zsum", num_generations=2, batch_size=4)
    texts = ["a", "bb", "a", "b"]
    batch = Batch(
        records=[Record({"prompt": "p"})] * 4,
        rows=[{"wrapper": "sft"}] * 4,
        prompts=["p"] * 4,
        completions=texts,
        tokens=[1] * 4,
        ended=[True] * 4,
        numbers=[5] * 4,
    )
    found = open_rewards(config, device="cpu", dtype="float32")(batch)
    # length 1, 0 and 1, 1: z 1, -1 and 0, 0; the letter 1, 0 and 1, 0: z 1, -1 and 1, -1
    assert found.raw == found.used == [2.0, -2.0, 1.0, -1.0]
    assert found.components[1] == {"length:1": 0.0, "regex:a": 0.0}


def test_verifiers_alone_need_no_reward_model(tiny_lm, prompts, tmp_path):
    folder = tmp_path / "out"
    program = shlex.join(
        [
            sys.executable,
            "-S",
            "-c",
            "import json, sys; print(len(json.load(sys.stdin)['output']) % 2)",
        ]
    )
    command = f"command:{program}"
    assert run(prompts, tiny_lm, folder, "--reward", command) == 0
    rollouts = lines(folder / "rollouts.jsonl")
    assert all(r["reward"] == len(r["output"]) % 2 for r in rollouts)
    assert {r["reward"] for r in rollouts} == {0, 1}


def test_a_faulty_server_gives_the_rewards_of_a_good_one(tiny_lm, tiny_rm, prompts, tmp_path):
    from polarctl.model.reward_model import load_encoder

    seen = []
    for share in (0.0, 0.3):
        with serving(share=share) as server:
            folder = tmp_path / str(share)
            options = ["--reward-model", tiny_rm, "--server", server.url, "--server-batch", "2"]
            options += ["--server-type", "vllm", "--server-model", "rm"]
            assert run(prompts, tiny_lm, folder, *options) == 0
            seen.append((folder / "rollouts.jsonl").read_bytes())
            assert (sum(server.seen[fault] for fault in FAULTS) > 0) == bool(share)
    assert seen[0] == seen[1]
    encoder = load_encoder(str(tiny_rm))
    for r in lines(tmp_path / "0.0" / "rollouts.jsonl"):
        ids = encoder.encode(r["prompt"], r["reference"], r["output"], r["wrapper"])
        assert r["components"]["polar"] == r["reward"] == pytest.approx(reward_of(ids))


def test_a_run_does_not_go_on_with_another_model_on_the_server(
    tiny_lm, tiny_rm, prompts, tmp_path, monkeypatch, capsys
):
    from polarctl.rl.callback import Recorder

    class Killed(BaseException):
        pass

    folder, real = tmp_path / "out", Recorder.on_save

    def call(self, *given, **more):
        real(self, *given, **more)
        raise Killed

    def go(server, *more):
        options = ["--reward-model", tiny_rm, "--server", server.url, "--save-steps", "1"]
        return run(prompts, tiny_lm, folder, *options, *more)

    with monkeypatch.context() as patch, serving() as server:
        patch.setattr(Recorder, "on_save", call)
        with pytest.raises(Killed):
            go(server)
    with serving(shift=1.0) as server:
        assert go(server) == 2
    assert "`served_" in capsys.readouterr().err
    with serving() as server:  # at another address, which does not matter
        assert go(server) == 0
        assert go(server) == 0  # complete already


def test_a_dead_server_stops_the_run(tiny_lm, tiny_rm, prompts, tmp_path, capsys):
    options = ["--reward-model", tiny_rm, "--server", "http://127.0.0.1:9"]
    status = run(prompts, tiny_lm, tmp_path / "out", *options, "--server-deadline", "0.2")
    assert status == 4
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_a_reward_model_that_reads_a_chat(tiny_chat_lm, prompts, tmp_path):
    folder, judge = tmp_path / "out", build_chat_rm(tmp_path / "judge")
    assert run(prompts, tiny_chat_lm, folder, "--reward", f"rm:{judge}") == 0
    rollouts = lines(folder / "rollouts.jsonl")
    scored = tmp_path / "scored.jsonl"
    source = str(folder / "rollouts.jsonl")
    assert cli.run(["score", source, "-m", str(judge), "-o", str(scored), "-q"]) == 0
    ours = [r["reward"] for r in rollouts]
    assert [r["reward"] for r in lines(scored)] == pytest.approx(ours, abs=1e-5)
    assert len(set(ours)) > GROUP
    # Another model under the same name is another run.
    build_chat_rm(judge, context=256)
    assert run(prompts, tiny_chat_lm, folder, "--reward", f"rm:{judge}") == 2


def test_a_verifier_that_fails_stops_the_run_and_names_the_record(
    tiny_lm, tiny_rm, prompts, tmp_path, capsys
):
    folder = tmp_path / "out"
    command = "command:" + shlex.join([sys.executable, "-S", "-c", "raise SystemExit('no luck')"])
    options = ["--reward-model", tiny_rm, "--reward", "polar", "--reward", command]
    assert run(prompts, tiny_lm, folder, *options) == 1
    said = capsys.readouterr().err
    assert f"{prompts}:" in said and "ended with status 1" in said and "no luck" in said
    assert "Traceback" not in said
    assert not (folder / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("options", "status", "text"),
    [
        ("--reward nobody", 2, "no reward `nobody`"),
        ("--reward polar", 2, "`--reward polar` needs `--reward-model`"),
        ("--reward exact --reward exact", 2, "`--reward exact` is given twice"),
        ("--reward exact --reward length:3 --combine gate", 2, "here is no model"),
        ("--reward exact --reward length:3 --reward-weights 1", 2, "1 `--reward-weights` for 2"),
        ("--reward exact:nothing", 3, "prompts.jsonl:1: none of the rewards applies"),
        (
            "--reward length:3 --reward exact:nothing",
            2,
            "`--reward exact:nothing` applies to no record",
        ),
        ("--reward gsm8k:prompt", 3, "prompts.jsonl:1: field `prompt`: `gsm8k:prompt` takes"),
        ("--reward rm:/nowhere", 4, "/nowhere"),
    ],
)
def test_rewards_that_cannot_work_are_refused_at_the_start(
    options, status, text, tiny_lm, tmp_path, capsys
):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "The sea", "reference": "was calm"}\n')
    assert run(path, tiny_lm, tmp_path / "out", *options.split()) == status
    assert text in capsys.readouterr().err
    assert not (tmp_path / "out" / "rollouts.jsonl").exists()
