"""The reward in the trainers' hands: called as TRL, verl and OpenRLHF call it, local and remote.

`tests/trainers` calls it through verl's and OpenRLHF's own code.
"""

import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from scoring.faulty_server import serving as faulty
from serving.test_serve import post, serving

from polarctl import cli
from polarctl.errors import PolarctlError, RecordError, UsageError
from polarctl.integrations import openrlhf, trl, verl

PROMPT, TURNS = "What is 3 + 4?", [{"role": "user", "content": "What is 3 + 4?"}]
OUTPUTS = ["It is 7.", "The sum is 7.", "Paris", "yes"]


@pytest.fixture(scope="module")
def served(tiny_rm):
    with serving("-m", tiny_rm, "--end-token", "<|end|>") as client:
        yield client


@pytest.fixture(scope="module", params=["local", "remote"])
def place(request):
    """Options of a shim for a reward model in this process, or on a server."""
    if request.param == "local":
        return {"device": "cpu"}
    return {"url": str(request.getfixturevalue("served").base_url)}


def scored(rows, model, folder):
    """The rewards that `polarctl score` gives."""
    path, out = folder / "in.jsonl", folder / "out.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["-m", str(model), "-o", str(out), "--device", "cpu", "-q", "--force"]
    assert cli.run(["score", str(path), *words, "--reward-floor", "-20"]) == 0
    return [json.loads(line)["reward"] for line in out.read_text().splitlines()]


@pytest.fixture(scope="module")
def wanted(tiny_rm, tmp_path_factory):
    rows = [{"prompt": PROMPT, "reference": "It is 7.", "output": text} for text in OUTPUTS]
    return pytest.approx(scored(rows, tiny_rm, tmp_path_factory.mktemp("score")), abs=1e-5)


# -- TRL ------------------------------------------------------------------------------------------


def grpo(model, dataset, reward, folder):
    import datasets
    from trl import GRPOConfig, GRPOTrainer

    arguments = GRPOConfig(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        num_generations=2,
        max_completion_length=6,
        max_steps=1,
        use_cpu=True,
        bf16=False,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        seed=3,
    )
    return GRPOTrainer(
        model=str(model),
        reward_funcs=reward,
        args=arguments,
        train_dataset=datasets.Dataset.from_list(dataset),
    )


@pytest.mark.parametrize("columns", ["reference", "verl"])
def test_a_step_of_trls_grpo_trains_on_the_rewards_of_score(
    columns, place, tiny_lm, tiny_rm, tmp_path
):
    seen = []
    reward = trl.reward_function(str(tiny_rm), **place)

    def watched(prompts, completions, **more):
        found = reward(prompts, completions, **more)
        seen.extend(zip(prompts, completions, found, strict=True))
        return found

    rows = [{"prompt": f"The sum {i} is", "reference": f" {i} boats"} for i in range(4)]
    references = {row["prompt"]: row["reference"] for row in rows}
    if columns == "verl":
        rows = [
            {
                "prompt": row["prompt"],
                "reward_model": {"style": "polar", "ground_truth": row["reference"]},
                "extra_info": {"wrapper": "pretrain"},
            }
            for row in rows
        ]
    trainer = grpo(tiny_lm, rows, watched, tmp_path)
    trainer.train()
    assert len(seen) == 4 and len({found for *_, found in seen}) > 1
    kind = {"wrapper": "pretrain"} if columns == "verl" else {}
    records = [
        {"prompt": prompt, "reference": references[prompt], "output": text, **kind}
        for prompt, text, _ in seen
    ]
    assert [r for *_, r in seen] == pytest.approx(scored(records, tiny_rm, tmp_path), abs=1e-5)
    (logged,) = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    assert logged == pytest.approx(np.mean([r for *_, r in seen]), abs=1e-4)


def test_a_completion_that_was_cut_off_gets_the_floor(tiny_rm, wanted):
    reward = trl.reward_function(str(tiny_rm), device="cpu", end_token_ids=[7])
    found = reward(
        prompts=[PROMPT] * 4,
        completions=OUTPUTS,
        completion_ids=[[1, 7], [7], [1, 2], []],
        ground_truth=["It is 7."] * 4,
    )
    assert found == [*(pytest.approx(r, abs=1e-5) for r in wanted.expected[:2]), -20, -20]


def test_a_server_that_fails_ends_the_training(tiny_lm, tiny_rm, tmp_path):
    with faulty() as server:
        reward = trl.reward_function(str(tiny_rm), url=server.url, server_deadline=0.5)
        server.share = 1.0  # from now on every reply is one of ten kinds of fault
        trainer = grpo(tiny_lm, [{"prompt": "a", "reference": "b"}] * 4, reward, tmp_path)
        with pytest.raises(PolarctlError):
            trainer.train()
        for call in (
            lambda: verl.compute_score(
                "x", "So.", "b", {"prompt": "a"}, model=str(tiny_rm), url=server.url
            ),
            lambda: openrlhf.reward_function(str(tiny_rm), url=server.url)(["a b"], ["a"], ["b"]),
        ):
            server.refuse = True  # for good
            with pytest.raises(PolarctlError):
                call()


# -- verl -----------------------------------------------------------------------------------------


def test_verl_calls_it_once_a_rollout_from_many_threads(place, tiny_rm, wanted):
    """As its naive reward manager does; a Parquet reader may give messages as arrays."""

    def score(text):
        return verl.compute_score(
            data_source="any",
            solution_str=text,
            ground_truth="It is 7.",
            extra_info={"prompt": np.array(TURNS, dtype=object), "num_turns": 2},
            model=str(tiny_rm),
            **place,
        )

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(score, OUTPUTS)) == wanted


def test_verls_batch_form_takes_the_keys_of_the_official_release(place, tiny_rm, wanted):
    """Messages as ground truth, with or without `ability` and `split`."""
    reference = [{"role": "assistant", "content": "It is 7."}]
    extra = [{"prompt": TURNS}, {"prompt": TURNS, "ability": "math", "split": "test", "index": 3}]
    found = verl.compute_score_batch(
        data_sources=np.array(["any"] * 4, dtype=object),
        solution_strs=OUTPUTS,
        ground_truths=[reference, "It is 7.", np.array(reference, dtype=object), reference],
        extra_infos=np.array(extra * 2, dtype=object),
        model=str(tiny_rm),
        **place,
    )
    assert found == wanted


def test_the_old_name_of_verls_function_stays(tiny_rm):
    from polarctl import verl_reward

    assert verl_reward.compute_score is verl.compute_score


def test_an_argument_that_nobody_knows_is_refused(tiny_rm):
    row = ("x", "So.", "Because.", {"prompt": "Why?"})
    told = {"model": str(tiny_rm), "device": "cpu"}
    assert verl.compute_score(*row, **told, reward_router_address="10.0.0.1:9")  # verl's own
    with pytest.raises(UsageError, match="reward_kwargs: .*'normalise'"):
        verl.compute_score(*row, **told, normalise="polar-7b")


# -- OpenRLHF -------------------------------------------------------------------------------------


def rollouts(end="<|end|>"):
    marked = f"<|user|>{PROMPT}<|end|><|assistant|>"
    label = {"prompt": TURNS, "reference": "It is 7.", "wrapper": None}
    return {
        "queries": [PROMPT + OUTPUTS[0] + end, *(marked + text + end for text in OUTPUTS[1:])],
        "prompts": [PROMPT, marked, marked, marked],
        "labels": ["It is 7.", label, label, label],
    }


def test_openrlhf_gets_tensors_and_labels_may_bring_the_bare_prompt(place, tiny_rm, wanted):
    reward_func = openrlhf.reward_function(str(tiny_rm), end_tokens=["<|end|>"], **place)
    reply = reward_func(**rollouts())
    assert reply["rewards"].shape == (4,) and reply["rewards"].tolist() == wanted
    assert reply["scores"].tolist() == wanted
    cut = rollouts()
    cut["queries"][2] = cut["queries"][2].removesuffix("<|end|>")
    assert reward_func(**cut)["rewards"].tolist()[2] == -20


def test_serve_reads_the_same_labels(served, wanted):
    body = rollouts()
    body["query"] = body.pop("queries")
    assert post(served, "/get_reward", body)["rewards"] == wanted


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"labels": [""]}, "`labels[0]` has no reference"),
        ({"labels": [{"prompt": "a"}]}, "`labels[0]` has no reference"),
        ({"labels": [{"reference": 3}]}, "`labels[0]`: field `reference`: expected"),
        ({"queries": ["b a"]}, "`query[0]` does not go on from its prompt"),
    ],
)
def test_a_rollout_that_cannot_be_scored_is_an_error(changed, said, served, tiny_rm):
    given = {"queries": ["a b"], "prompts": ["a"], "labels": ["r"], **changed}
    with pytest.raises(RecordError) as error:
        openrlhf.reward_function(str(tiny_rm), device="cpu")(**given)
    assert said in str(error.value)
    given["query"] = given.pop("queries")
    assert said in post(served, "/get_reward", given, 400)["error"]["message"]
