"""`polarctl serve` as clients meet it: a real process, over HTTP."""

import contextlib
import json
import os
import random
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata

import httpx2 as httpx
import pytest
from model.internlm2.official import build_official
from safetensors.torch import load_file, save_file
from tiny import build_chat_rm

from polarctl.cli import run
from polarctl.model import reward_model
from polarctl.parallel.served import unlike
from polarctl.scoring.server import ServerScorer
from polarctl.serving.batching import Batcher, Closed

CANDIDATES = ["yes", "no", "it is so", "perhaps " * 9]
GROUP = {
    "prompt": "Is it so? " * 5,
    "reference": "yes",
    "candidates": [{"output": text} for text in CANDIDATES],
}
SINGLE = {"prompt": [{"role": "user", "content": "Why?"}], "reference": "So.", "output": "No."}


def started(*arguments, **variables):
    """A server process, and the line that it says when it is ready."""
    child = subprocess.Popen(
        [sys.executable, "-m", "polarctl", "serve", *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **variables},
    )
    said = ""
    for line in child.stderr:
        said += line
        if line.startswith("serving "):
            threading.Thread(target=_emptied, args=(child.stderr,), daemon=True).start()
            return child, line.split()[-1]
    raise AssertionError(f"status {child.wait()}: {said}")


def _emptied(stream):
    with stream:
        stream.read()


@contextlib.contextmanager
def serving(*arguments, **variables):
    child, address = started(*arguments, "--port", 0, **variables)
    try:
        with httpx.Client(base_url=address, timeout=60) as client:
            client.pid = child.pid
            yield client
    finally:
        child.terminate()
        assert child.wait(30) == 0


@pytest.fixture(scope="module")
def server(tiny_rm):
    options = ["--max-inputs", 600, "--max-body-mib", 1, "--end-token", "<|im_end|>"]
    with serving("-m", tiny_rm, *options, "--end-token", "</s>") as client:
        yield client


@pytest.fixture(scope="module")
def wanted(tiny_rm, tmp_path_factory):
    """What `polarctl score` gives for the group."""
    folder = tmp_path_factory.mktemp("score")
    (folder / "in.jsonl").write_text(json.dumps(GROUP) + "\n")
    out = folder / "out.jsonl"
    assert run(["score", str(folder / "in.jsonl"), "-m", str(tiny_rm), "-o", str(out), "-q"]) == 0
    return pytest.approx(json.loads(out.read_text())["rewards"], abs=1e-5)


@pytest.fixture(scope="module")
def inputs(tiny_rm):
    """The glued texts of the group's candidates, and their ids."""
    encoder = reward_model.load_encoder(str(tiny_rm))
    given = [(GROUP["prompt"], "yes", text) for text in CANDIDATES]
    return [encoder.text(*one) for one in given], [encoder.encode(*one) for one in given]


def post(server, route, body, status=200):
    reply = server.post(route, json=body)
    assert reply.status_code == status, reply.text
    return reply.json()


# -- every route gives the rewards of `score` -----------------------------------------------------


def test_records_are_scored_as_they_are_in_a_file(server, wanted):
    one = post(server, "/score", GROUP)
    assert one["rewards"] == wanted and one["truncated"] == [[], [], [], ["output"]]
    assert all(type(count) is int for count in one["tokens"])
    both = post(server, "/score", [SINGLE, GROUP])
    assert set(both[0]) == {"reward", "tokens", "truncated"} and both[1]["rewards"] == wanted
    pair = {**GROUP, "chosen": "yes", "rejected": "no"}
    del pair["candidates"]
    assert post(server, "/score", pair)["rewards"] == pytest.approx(one["rewards"][:2], abs=1e-5)


@pytest.mark.parametrize("kind", [0, 1], ids=["text", "ids"])
def test_the_shapes_of_vllm(kind, server, wanted, inputs):
    given = inputs[kind]
    body = {"model": "POLAR-7B", "input": given, "use_activation": False, "priority": 3}
    reply = post(server, "/classify", body)
    assert [row["probs"] for row in reply["data"]] == [[r] for r in wanted.expected]
    assert [row["index"] for row in reply["data"]] == [0, 1, 2, 3]
    assert reply["usage"]["prompt_tokens"] == sum(map(len, inputs[1]))
    reply = post(server, "/pooling", {"model": "POLAR-7B", "input": given})
    assert [row["data"][0] for row in reply["data"]] == wanted
    (row,) = post(server, "/classify", {"input": given[2]})["data"]
    assert row["probs"] == pytest.approx([wanted.expected[2]], abs=1e-5)


# How the published POLAR client reads a reply in its three modes, and the option that it needs.
MODES = {
    "sglang": ("list", "/classify", "text", lambda r: [e["embedding"][0] for e in r]),
    "vllm": (
        "nested",
        "/pooling",
        "input",
        lambda reply: [e["data"][-1][0] for e in reply["data"]],
    ),
    "lmdeploy": ("number", "/pooling", "input", lambda reply: [e["data"] for e in reply["data"]]),
}


@contextlib.contextmanager
def within(folder, **options):
    """The routes in a thread of this process, over a real scorer."""
    import uvicorn

    from polarctl.scoring.scorer import load_scorer
    from polarctl.serving.app import Service, create
    from polarctl.serving.limits import Limits

    scorer = load_scorer(str(folder), device="cpu", dtype="float32", batch_tokens=8192)
    app = create(Service(scorer, "rm", Limits(), **options))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            yield client
    finally:
        server.should_exit = True
        thread.join(60)


@pytest.mark.parametrize("data", ["list", "nested", "number"])
def test_the_modes_of_the_published_client(data, tiny_rm, wanted, inputs):
    """`serve --pooling-data` writes what each of them reads; SGLang's shape is always there."""
    with within(tiny_rm, pooling=data) as client:
        for needs, route, field, read in MODES.values():
            if needs == data or route == "/classify":
                assert read(post(client, route, {field: inputs[0]})) == wanted
        rows = post(client, "/pooling", {"input": inputs[0]})["data"]
        assert ([row["data"] for row in rows] == [[r] for r in wanted.expected]) == (data == "list")


def test_a_query_that_openrlhf_has_cut_or_decoded_otherwise_is_scored(server, wanted):
    prompt, response = GROUP["prompt"], "it is so"
    right = pytest.approx(wanted.expected[2], abs=1e-5)
    label = {"reference": "yes", "prompt": GROUP["prompt"]}
    marked = f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
    # Cut from the left, in the middle of a word; decoded with other blanks; with a character that
    # the vocabulary does not have; with a BOS before it.
    spaced = marked.replace("<|im_end|>\n", "<|im_end|> \n ")
    for said, head in (
        (marked, marked[25:]),
        (marked, spaced),
        (marked.replace("user\n", "user\nné "), marked.replace("user\n", "user\nn<unk> ")),
        (marked, "<s> " + marked),
        (prompt, prompt[9:]),
    ):
        body = {"query": [head + response + "<|im_end|>"], "prompts": [said], "labels": [label]}
        assert post(server, "/get_reward", body)["rewards"] == [right], head
    body["query"] = ["something else"]
    assert "does not go on from" in post(server, "/get_reward", body, 400)["error"]["message"]


def test_an_empty_label_is_said_to_the_client_and_once_by_the_server(tiny_rm, capfd):
    """OpenRLHF sends it without --data.label_key, and logs no more than the reply's status."""
    body = {"query": ["Why?So."], "prompts": ["Why?"], "labels": [""]}
    with within(tiny_rm) as client:
        for _ in range(3):
            said = post(client, "/get_reward", body, 400)["error"]["message"]
            assert "`labels[0]` has no reference" in said and "--data.label_key" in said
    assert capfd.readouterr().err.count("/get_reward: `labels[0]` has no reference") == 1


def test_other_routes_answer_or_say_what_is_served(server, wanted, inputs):
    assert post(server, "/v1/score", GROUP)["rewards"] == wanted
    for route in ("/score", "/v1/score"):  # as vLLM's clients of cross-encoders ask
        body = {"model": "m", "text_1": "a", "text_2": ["b", "c"]}
        said = post(server, route, body, 400)["error"]["message"]
        assert '"prompt", "reference"' in said
    messages = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    for route in ("/pooling", "/classify", "/tokenize"):
        said = post(server, route, {"model": "m", "messages": messages}, 400)["error"]["message"]
        assert "reads no conversation; /score takes" in said
    reply = post(server, "/tokenize", {"model": "m", "prompt": inputs[0][0]})
    assert (reply["tokens"], reply["count"]) == (inputs[1][0], len(inputs[1][0]))
    assert "`prompt` must be a text" in post(server, "/tokenize", {}, 400)["error"]["message"]
    said = post(server, "/v1/chat/completions", {"messages": messages}, 404)["error"]["message"]
    assert said.startswith("POST /v1/chat/completions: Not Found; served: /score, ")


def test_openrlhf_gets_a_reward_for_each_rollout(server, wanted):
    prompt = GROUP["prompt"]
    body = {
        "query": [prompt + text for text in CANDIDATES],
        "prompts": [prompt] * 4,
        "labels": ["yes"] * 4,
    }
    reply = post(server, "/get_reward", body)
    assert reply["rewards"] == wanted and reply["scores"] == wanted and reply["extra_logs"] == {}
    body["query"] = [prompt + "yes" + end for end in ("<|im_end|>", "</s>\n", "", "<|eot_id|>")]
    rewards = post(server, "/get_reward", body)["rewards"]
    assert rewards[:3] == pytest.approx([wanted.expected[0]] * 3, abs=1e-5)
    assert rewards[3] != pytest.approx(rewards[2], abs=1e-3)  # nobody has said that it ends a text


def test_outputs_without_an_answer_get_the_floor(tiny_rm, wanted):
    options = ["--strip-thinking", "--reward-floor", "-30", "--end-token", "<|im_end|>"]
    with serving("-m", tiny_rm, *options) as client:
        texts = ["<think>a</think>yes", "<think>a", " ", "no"]
        group = {**GROUP, "candidates": [{"output": text} for text in texts]}
        group["candidates"][3]["finish_reason"] = "length"
        reply = post(client, "/score", group)
        best = pytest.approx(wanted.expected[0], abs=1e-5)
        assert reply["rewards"] == [best, -30, -30, -30]
        assert reply["floored"] == [None, "unclosed", "empty", "cut_off"]
        prompt, ended = GROUP["prompt"], "<|im_end|>"
        texts = ["<think>a</think>yes" + ended, "<think>a" + ended, ended, "yes"]
        body = {
            "query": [prompt + text for text in texts],
            "prompts": [prompt] * 4,
            "labels": ["yes"] * 4,
        }
        assert post(client, "/get_reward", body)["rewards"] == [best, -30, -30, -30]
        metrics = client.get("/metrics").text
        for reason in ("unclosed", "empty", "cut_off"):
            assert f'polarctl_floored_total{{reason="{reason}"}} 2.0' in metrics


@pytest.mark.parametrize("kind", ["auto", "polarctl", "vllm", "sglang", "lmdeploy"])
def test_score_through_the_server_gives_the_same(kind, server, wanted, tiny_rm, tmp_path):
    (tmp_path / "in.jsonl").write_text(json.dumps(GROUP) + "\n")
    arguments = ["score", str(tmp_path / "in.jsonl"), "-m", str(tiny_rm), "--server-type", kind]
    arguments += ["--server", str(server.base_url), "-o", str(tmp_path / "out.jsonl")]
    assert run(arguments) == 0
    assert json.loads((tmp_path / "out.jsonl").read_text())["rewards"] == wanted


def test_a_published_checkpoint_is_served_without_its_code(tmp_path):
    canary = tmp_path / "canary"
    folder = build_official(tmp_path / "POLAR-7B", format="bin", max_positions=512, canary=canary)
    (tmp_path / "in.jsonl").write_text(json.dumps(GROUP) + "\n")
    out = tmp_path / "out.jsonl"
    assert run(["score", str(tmp_path / "in.jsonl"), "-m", str(folder), "-o", str(out)]) == 0
    with serving("-m", folder, "--served-model-name", "POLAR-7B") as client:
        found = post(client, "/score", GROUP)["rewards"]
        assert client.get("/v1/models").json()["data"][0]["id"] == "POLAR-7B"
    assert found == pytest.approx(json.loads(out.read_text())["rewards"], abs=1e-5)
    assert not canary.exists()


@pytest.mark.slow
def test_the_list_of_models_tells_weights_of_the_same_name_apart(tiny_rm, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(tiny_rm, other)
    weights = load_file(other / "model.safetensors")
    weights["score.weight"] += 1e-6  # too little for any reward that is compared
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    encoder, told = reward_model.load_encoder(str(tiny_rm)), []
    for folder in (tiny_rm, tiny_rm, other):
        with serving("-m", folder, "--served-model-name", "rm") as client:
            scorer = ServerScorer(str(client.base_url), encoder)
            told.append(scorer.served())
            scorer.close()
    assert told[0]["served_by"] == "polarctl" and told[0]["served_model"] == "rm"
    assert unlike(told[0], told[1]) is None
    assert unlike(told[0], told[2]) == "served_fingerprint"


def test_many_clients_at_once_each_get_their_own_rewards(server, inputs):
    _, ids = inputs
    alone = [post(server, "/classify", {"input": one})["data"][0]["probs"][0] for one in ids]
    draw = random.Random(0)

    def ask(_):
        order = draw.sample(range(4), draw.randint(1, 4))
        reply = post(server, "/classify", {"input": [ids[i] for i in order]})
        return order, [row["probs"][0] for row in reply["data"]]

    before = metrics(server)
    with ThreadPoolExecutor(24) as pool:
        for order, found in pool.map(ask, range(200)):
            assert found == pytest.approx([alone[i] for i in order], abs=1e-5)
    after = metrics(server)
    requests = 'polarctl_requests_total{route="/classify",status="200"}'
    assert after[requests] - before[requests] == 200
    batches = after["polarctl_batches_total"] - before["polarctl_batches_total"]
    assert batches < 150  # those that wait together are computed together


def metrics(server):
    lines = server.get("/metrics").text.splitlines()
    pairs = [line.rsplit(" ", 1) for line in lines if not line.startswith("#")]
    return {name: float(value) for name, value in pairs}


def test_a_chat_reward_model_is_read_as_score_reads_it(tmp_path, capfd):
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = build_chat_rm(tmp_path / "skywork", pad="<|pad|>")
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def reward(output):
        turns = [("user", GROUP["prompt"]), ("assistant", output)]
        ids = tokenizer.apply_chat_template(
            [{"role": role, "content": text} for role, text in turns], return_tensors="pt"
        )["input_ids"]
        with torch.inference_mode():
            return model(ids).logits.item()

    wanted = pytest.approx([reward(text) for text in CANDIDATES[:3]], abs=1e-5)
    group = {**GROUP, "candidates": GROUP["candidates"][:3]}
    (tmp_path / "in.jsonl").write_text(json.dumps(group) + "\n")
    out = tmp_path / "out.jsonl"
    assert run(["score", str(tmp_path / "in.jsonl"), "-m", str(folder), "-o", str(out)]) == 0
    assert json.loads(out.read_text())["rewards"] == wanted
    prompts, rollouts = [GROUP["prompt"]] * 3, [GROUP["prompt"] + text for text in CANDIDATES[:3]]
    for style in ("auto", "chat"):
        with serving("-m", folder, "--prompt-style", style) as client:
            assert post(client, "/score", group)["rewards"] == wanted
            del group["reference"]  # it reads none
            assert post(client, "/score", group)["rewards"] == wanted
            group["reference"] = "yes"
            body = {"query": rollouts, "prompts": prompts, "labels": ["yes"] * 3}
            assert post(client, "/get_reward", body)["rewards"] == wanted
            messages = [{"role": "user", "content": GROUP["prompt"]}]
            messages += [{"role": "assistant", "content": CANDIDATES[1]}]
            (row,) = post(client, "/pooling", {"model": "m", "messages": messages})["data"]
            assert row["data"] == pytest.approx([wanted.expected[1]], abs=1e-5)
            count = post(client, "/tokenize", {"messages": messages})["count"]
            assert count == len(tokenizer.apply_chat_template(messages)["input_ids"])
            # Whole inputs are written by POLAR's template, so their rewards would mean nothing.
            for route in ("/classify", "/pooling"):
                for given in ([5, 6, 7], "yes<|reward|>yes[UNUSED_TOKEN_130]"):
                    said = post(client, route, {"input": given}, 400)["error"]["message"]
                    assert "reads conversations" in said and "/score" in said
    capfd.readouterr()
    assert run(["serve", "-m", str(folder), "--port", "0", "--prompt-style", "polar"]) == 2
    assert "its template does not work" in capfd.readouterr().err
    assert run(["serve", "-m", str(folder), "--port", "0", "--prompt-style", "chatty"]) == 2
    assert "`chatty` is not one of" in capfd.readouterr().err


# -- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("route", "body", "status", "said"),
    [
        ("/classify", {}, 400, "`input` must be"),
        ("/classify", {"input": []}, 400, "`input` must be"),
        ("/classify", {"input": [1.5]}, 400, "`input[0]` is no text"),
        ("/classify", {"input": [["a"]]}, 400, "`input[0]` is no text"),
        ("/classify", {"text": 3}, 400, "`text` must be"),
        ("/classify", {"input": "no reward token"}, 400, "the tokenizer reads"),
        ("/classify", {"input": [[1, 2, 3]]}, 400, "an input must end in"),
        ("/classify", {"input": ["x"] * 601}, 413, "601 inputs; a request takes 600"),
        ("/pooling", [1], 400, "must be a JSON object"),
        ("/score", {"prompt": "p", "reference": "r"}, 400, "the record: needs either `output`"),
        ("/score", [SINGLE, {"prompt": "p", "output": "o"}], 400, "record 1: missing field"),
        ("/score", [SINGLE, 3], 400, "record 1 is no JSON object"),
        ("/get_reward", {"query": ["a"], "prompts": ["a"]}, 400, "`labels` must be a list"),
        ("/get_reward", {"query": ["a"], "prompts": [], "labels": []}, 400, "of one length"),
    ],
)
def test_a_bad_request_is_told_what_is_wrong(route, body, status, said, server):
    reply = post(server, route, body, status)
    assert said in reply["error"]["message"] and reply["error"]["code"] == status


def test_ids_that_the_model_does_not_know_are_refused(server, inputs):
    _, ids = inputs
    for wrong in (-1, 10**6):
        said = post(server, "/classify", {"input": [[wrong, *ids[0]]]}, 400)["error"]["message"]
        assert "a token id that is not in 0 to" in said
    said = post(server, "/classify", {"input": [ids[0] * 400]}, 400)["error"]["message"]
    assert "tokens; the model takes" in said


def test_nonsense_and_large_bodies_end_in_an_error_and_the_server_goes_on(server, inputs):
    assert server.post("/score", content=b"{nope").status_code == 400
    assert server.post("/score", content=b"\xff" * 100).status_code == 400
    assert server.post("/score", content=b" " * (1 << 20) + b"{}").status_code == 413
    assert server.post("/score", content=(b" " * 9999 for _ in range(999))).status_code == 413
    for route, status in (("/nowhere", 404), ("/score", 405)):
        reply = server.get(route)
        assert reply.status_code == reply.json()["error"]["code"] == status
    assert server.get("/health").status_code == server.head("/health").status_code == 200
    post(server, "/classify", {"input": inputs[1]})


def test_a_client_that_goes_away_is_no_failure_of_the_server(server):
    gone = 'polarctl_requests_total{route="/score",status="400"}'
    before = metrics(server)
    head = b"POST /score HTTP/1.1\r\nHost: here\r\nContent-Length: 1000\r\n\r\n{"
    with socket.create_connection((server.base_url.host, server.base_url.port)) as client:
        client.sendall(head)
    until = time.monotonic() + 10
    while metrics(server).get(gone, 0) == before.get(gone, 0):
        assert time.monotonic() < until
        time.sleep(0.01)
    failed = 'polarctl_requests_total{route="/score",status="500"}'
    assert metrics(server).get(failed, 0) == before.get(failed, 0)


# -- one request does not end the server ----------------------------------------------------------


def peak_mib(client):
    """The most memory that the server's process has had."""
    with open(f"/proc/{client.pid}/status") as status:
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read())[1]) / 1024


@pytest.fixture(scope="module")
def plain(tiny_rm):
    """A server with its default limits."""
    with serving("-m", tiny_rm) as client:
        post(client, "/score", GROUP)  # what it loads once, it has
        yield client


needs_proc = pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads /proc")


@needs_proc
def test_a_text_of_30_mib_is_refused_before_it_is_tokenized(plain, wanted):
    text = "The sea was calm. " * (30 * 2**20 // 18)
    before = peak_mib(plain)
    start = time.monotonic()
    for route, body in (
        ("/score", {**SINGLE, "output": text}),
        ("/score", {**SINGLE, "prompt": [{"role": "user", "content": text}]}),
        ("/score", {**GROUP, "candidates": [{"output": "a"}, {"output": text}]}),
        ("/classify", {"input": text}),
        ("/pooling", {"input": ["a", text]}),
        ("/get_reward", {"query": ["a" + text], "prompts": ["a"], "labels": ["r"]}),
    ):
        said = post(plain, route, body, 413)["error"]["message"]
        assert re.search(r"31,4\d\d,\d\d\d characters; .* 262,144 \(--max-text-chars\)", said)
    assert time.monotonic() - start < 60  # to tokenize one takes longer
    # The bodies, which starlette before 1.0 copies more often (540 MiB); to tokenize one takes more
    # than 6,000.
    old = int(metadata.version("starlette").split(".")[0]) < 1
    assert peak_mib(plain) - before < (800 if old else 400)
    assert post(plain, "/score", GROUP)["rewards"] == wanted


@needs_proc
def test_texts_of_the_longest_kind_at_once_stay_in_bounded_memory(plain, wanted):
    text = "a" * 262_144
    before = peak_mib(plain)
    with ThreadPoolExecutor(32) as pool:
        asked = [pool.submit(post, plain, "/score", {**SINGLE, "output": text}) for _ in range(32)]
        done = 0
        while not all(one.done() for one in asked):
            assert post(plain, "/score", GROUP)["rewards"] == wanted
            done += 1
        assert done > 1
        assert {tuple(one.result()["truncated"]) for one in asked} == {("output",)}
    # 75 MiB for each of four texts that are tokenized at a time, and their ids.
    assert peak_mib(plain) - before < 1000


@pytest.mark.parametrize(
    ("body", "said"),
    [
        # 200 references and 200 candidates are 40,000 rewards.
        (
            {
                "prompt": "p",
                "references": ["r"] * 200,
                "candidates": [{"output": "o"}] * 200,
            },
            "40,000 inputs; a request takes 4,096 (--max-inputs)",
        ),
        ([{**SINGLE, "references": ["r"] * 4097}], "has both `reference` and `references`"),
        ({"prompt": "p", "references": ["r"] * 4097, "output": "o"}, "4,097 inputs"),
        ([GROUP] * 1025, "4,100 inputs"),
        # 4,000 x (260,000 + 1 + 1): the prompt is read with every candidate.
        (
            {"prompt": "a" * 260_000, "reference": "r", "candidates": [{"output": "o"}] * 4000},
            "1,040,008,000 characters",
        ),
        # 100 times 200,000 characters of a reference, as many of a candidate, and 1 of the prompt.
        (
            {
                "prompt": "p",
                "references": ["r" * 200_000] * 10,
                "candidates": [{"output": "o" * 200_000}] * 10,
            },
            "40,000,100 characters",
        ),
    ],
    ids=["product", "both", "references", "groups", "prompt", "texts"],
)
def test_all_inputs_of_a_request_are_bounded_before_the_first(body, said, plain):
    start = time.monotonic()
    reply = plain.post("/score", json=body)
    assert reply.status_code == (400 if "both" in said else 413), reply.text
    assert said in reply.json()["error"]["message"]
    assert time.monotonic() - start < 10


def test_the_limits_are_options(tiny_rm):
    options = ["--max-text-chars", 10, "--max-chars", 50, "--pooling-data", "number"]
    with serving("-m", tiny_rm, *options) as client:
        end = reward_model.load_encoder(str(tiny_rm)).reward_token_id
        (row,) = post(client, "/pooling", {"input": [5, 6, end]})["data"]
        assert isinstance(row["data"], float)
        fits = {"prompt": "0123456789", "reference": "r", "output": "0123456789"}
        post(client, "/score", fits)
        said = post(client, "/score", {**fits, "reference": "0" * 11}, 413)["error"]["message"]
        assert said == "a text of 11 characters; the server takes 10 (--max-text-chars)"
        said = post(client, "/score", [fits] * 3, 413)["error"]["message"]
        assert said.startswith("63 characters, each input with its prompt and reference; a request")
        rollouts = {"query": ["abcd"] * 10, "prompts": ["ab"] * 10, "labels": ["e"] * 10}
        post(client, "/get_reward", rollouts)  # 10 x (2 + 1 + 2) are 50
        rollouts["labels"][0] = "ef"
        assert "51 characters" in post(client, "/get_reward", rollouts, 413)["error"]["message"]
        ids = {"input": [[1] * 26, [2] * 25]}
        assert "51 characters" in post(client, "/pooling", ids, 413)["error"]["message"]


def test_bodies_on_their_way_are_bounded_together(tiny_rm):
    head = b"POST /score HTTP/1.1\r\nHost: here\r\nContent-Length: 1048576\r\n\r\n"
    with serving("-m", tiny_rm, "--max-body-mib", 1) as client, contextlib.ExitStack() as stack:
        slow = []
        for _ in range(5):  # 4.95 MiB, and the server holds four times the largest body
            place = client.base_url.host, client.base_url.port
            slow.append(stack.enter_context(socket.create_connection(place)))
            slow[-1].sendall(head + b" " * (1048576 - 10_000))
        (refused, *others), _, _ = select.select(slow, [], [], 30)
        reply = refused.recv(65536)
        assert reply.startswith(b"HTTP/1.1 503") and b"retry-after: 1" in reply.lower()
        assert not others
        post(client, "/score", SINGLE)  # what fits is answered in the meantime
        assert select.select([one for one in slow if one is not refused], [], [], 0.2)[0] == []
        stack.close()
        until = time.monotonic() + 30
        while client.post("/score", json={**SINGLE, "note": "a" * 900_000}).status_code != 200:
            assert time.monotonic() < until
            time.sleep(0.01)


def test_a_large_request_does_not_keep_others_waiting(tiny_rm, wanted):
    large = {**GROUP, "candidates": [{"output": f"{i} it is so"} for i in range(4000)]}
    with serving("-m", tiny_rm, "--batch-tokens", 256) as client, ThreadPoolExecutor() as pool:
        waiting = pool.submit(post, client, "/score", large)
        while "polarctl_batches_total 0.0" in client.get("/metrics").text:
            time.sleep(0.005)
        served = 0
        while not waiting.done() and served < 5:
            assert post(client, "/score", GROUP)["rewards"] == wanted
            served += 1
        assert served == 5 and not waiting.done()
        alone = post(client, "/score", {**GROUP, "candidates": large["candidates"][3990:]})
        assert waiting.result()["rewards"][3990:] == pytest.approx(alone["rewards"], abs=1e-5)


# -- who may ask ----------------------------------------------------------------------------------


def test_with_a_key_every_route_but_health_asks_for_it(tiny_rm, tmp_path):
    (tmp_path / "key").write_text("s3cret\nnot this\n")
    with serving("-m", tiny_rm, "--key-file", tmp_path / "key", "--host", "0.0.0.0") as client:
        assert client.get("/health").status_code == 200
        routes = ["/v1/models", "/metrics", "/docs", "/openapi.json", "/nowhere"]
        assert {client.get(route).status_code for route in routes} == {401}
        for sent in ({}, {"Authorization": "s3cret"}, {"Authorization": "Bearer s3cre"}):
            assert client.post("/score", json=GROUP, headers=sent).status_code == 401
        known = {"Authorization": "Bearer s3cret"}
        assert client.post("/score", json=GROUP, headers=known).status_code == 200
        assert client.get("/metrics", headers=known).status_code == 200


def raw(client, method, target, host, *headers):
    """The status of a request as it stands: clients would tidy it up."""
    lines = [f"{method} {target} HTTP/1.1", f"Host: {host}", "Connection: close", *headers]
    with socket.create_connection((client.base_url.host, client.base_url.port)) as connection:
        connection.sendall("\r\n".join([*lines, "Content-Length: 0", "", ""]).encode("latin-1"))
        reply = b"".join(iter(lambda: connection.recv(65536), b""))
    return int(reply.split()[1])


def test_no_way_of_writing_a_request_goes_round_the_key(tiny_rm):
    from fastapi.routing import APIRoute
    from starlette.routing import Route

    from polarctl.scoring.scorer import load_scorer
    from polarctl.serving.app import Service, create
    from polarctl.serving.limits import Limits

    scorer = load_scorer(str(tiny_rm), device="cpu", dtype="auto", batch_tokens=64)
    service = Service(scorer, "rm", Limits())
    app = create(service, "s3cret")
    service.close()
    # The check is for HTTP requests: there must be no mounted application and no web socket.
    assert {type(route) for route in app.routes} == {APIRoute, Route}
    paths = {route.path for route in app.routes}
    assert {"/score", "/metrics", "/v1/models", "/docs", "/openapi.json", "/health"} <= paths
    targets = sorted(paths - {"/health"})
    targets += [path + "/" for path in paths] + ["/" + path for path in paths]
    targets += ["/%6detrics", "/%2Fmetrics", "/health/../metrics", "/health%2F..%2Fmetrics"]
    targets += ["/metrics?x=/health", "/metrics#/health", "/health%0A", "/HEALTH", "*", "/"]
    targets += ["http://x/health", "http://x/metrics", "/metrics;/health"]
    hosts = ["here", "x/health#", "x/health?", "/health#", "x/health", "[", "", "a b", "@/health#"]
    with serving("-m", tiny_rm, POLARCTL_SERVER_KEY="s3cret") as client:
        for host in hosts:
            for target in targets:
                for method in ("GET", "POST", "HEAD", "OPTIONS"):
                    status = raw(client, method, target, host)
                    assert status in (400, 401), (method, target, host, status)
                    assert status == 401 or host != "here" or target == "*"
            known = "Authorization: Bearer s3cret"
            assert raw(client, "GET", "/metrics", host, known) in (200, 400)
            assert raw(client, "GET", "/nowhere", host, known) in (404, 400)
        assert raw(client, "GET", "/health", "here") == 200
        assert raw(client, "GET", "/metrics", "x/health#", known) == 200


def test_another_address_needs_a_key(tiny_rm, tmp_path, capfd, monkeypatch):
    monkeypatch.delenv("POLARCTL_SERVER_KEY", raising=False)
    assert run(["serve", "-m", str(tiny_rm), "--host", "0.0.0.0"]) == 2
    assert "needs a key" in capfd.readouterr().err
    (tmp_path / "empty").write_text("\n")
    assert run(["serve", "-m", str(tiny_rm), "--key-file", str(tmp_path / "empty")]) == 2
    assert run(["serve", "-m", str(tiny_rm), "--key-file", str(tmp_path / "no")]) == 2


def test_a_port_that_is_taken_is_said_before_the_model_is_loaded(tiny_rm, capfd):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert run(["serve", "-m", str(tiny_rm), "--port", port]) == 2
    said = capfd.readouterr().err
    assert f"cannot listen on 127.0.0.1:{port}: " in said and "device" not in said
    assert run(["serve", "-m", "no/where", "--port", "0"]) == 4


# -- its end --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_lets_it_finish_what_it_has_begun(number, status, tiny_rm, inputs):
    child, address = started("-m", tiny_rm, "--port", 0)
    body = {"input": [inputs[1][3]] * 1000}
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(httpx.post, address + "/classify", json=body, timeout=60)
        while "polarctl_batches_total 0.0" in httpx.get(address + "/metrics").text:
            time.sleep(0.005)
        child.send_signal(number)
        reply = waiting.result()
    assert reply.status_code == 200 and len(reply.json()["data"]) == 1000
    assert child.wait(30) == status


def test_a_request_that_fails_takes_no_other_with_it():
    entered, go_on = threading.Event(), threading.Event()

    def rewards_of(groups):
        entered.set()
        assert go_on.wait(10)
        if any(13 in ids for group in groups for ids in group):
            raise ValueError("13")
        return [[float(sum(ids)) for ids in group] for group in groups]

    batcher = Batcher(rewards_of, batch_tokens=4)
    with ThreadPoolExecutor(4) as pool:
        first = pool.submit(batcher.rewards, [[[1, 2]]])
        assert entered.wait(10)
        # Both are larger than a batch and share one.
        good = pool.submit(batcher.rewards, [[[1, 2], [1, 3]], [[4]], [[1, 2, 3, 4, 5]], [[6, 7]]])
        bad = pool.submit(batcher.rewards, [[[3]], [[9, 13]], [[4, 5, 6]], [[8]]])
        while batcher.waiting() < 2:
            time.sleep(0.001)
        go_on.set()
        assert first.result(10) == [[3.0]]
        assert good.result(10) == [[3.0, 4.0], [4.0], [15.0], [13.0]]
        with pytest.raises(ValueError, match="13"):
            bad.result(10)
    assert batcher.rewards([]) == [] and batcher.waiting() == 0
    batcher.close()


def test_closing_computes_nothing_more_for_those_who_have_given_up():
    started, go_on, computed = threading.Event(), threading.Event(), []

    def rewards_of(groups):
        started.set()
        go_on.wait(10)
        computed.append(len(groups))
        return [[0.0] for _ in groups]

    batcher = Batcher(rewards_of, batch_tokens=1)
    with ThreadPoolExecutor(4) as pool:
        first = pool.submit(batcher.rewards, [[[1]]])
        assert started.wait(10)
        others = [pool.submit(batcher.rewards, [[[1]]]) for _ in range(2)]
        while batcher.waiting() < 2:
            time.sleep(0.001)
        closing = pool.submit(batcher.close)
        for other in others:
            with pytest.raises(Closed):
                other.result(10)
        go_on.set()
        closing.result(10)
    assert first.result() == [[0.0]] and computed == [1]
    with pytest.raises(Closed):
        batcher.rewards([[[1]]])
