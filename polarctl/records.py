"""The records that stages exchange, one JSON object a line.

Each class is the contract of one kind of record; `schemas/*.schema.json` are exported from here
(`make reference`) and a test holds the two equal. In memory a record stays a dict (`Record`), so
that unknown fields pass through untouched; the classes check it.
"""

from __future__ import annotations

import hashlib
import re
from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from polarctl.errors import RecordError, UsageError

SCHEMA_VERSION = 1


class Record(dict[str, Any]):
    """A decoded line that remembers where it came from.

    Attributes:
        where: `file:line` of the line, for messages.
    """

    __slots__ = ("where",)

    def __init__(self, fields: dict[str, Any], where: str | None = None):
        super().__init__(fields)
        self.where = where


def _says(text: str) -> Meta:
    return Meta(description=text)


class TextPart(Struct):
    """One part of a message's content in OpenAI's list form."""

    type: Annotated[Literal["text"], _says("Only text parts are supported.")]
    text: Annotated[str, _says("The text.")]


class Message(Struct):
    """One message of a conversation."""

    role: Annotated[str, _says("Who speaks: system, user, assistant, ...")]
    content: Annotated[str | list[TextPart], _says("The text, or a list of text parts.")]


Text = str | list[Message]
Wrapper = Literal["sft", "pretrain"]
_Above0 = Annotated[float, Meta(gt=0)]
_Share = Annotated[float, Meta(gt=0, le=1)]
_From1 = Annotated[int, Meta(ge=1)]
_Dtype = Literal["auto", "float32", "bfloat16", "float16"]

_TEXT_FOR_OBJECT = re.compile(r"field `candidates\[.*\]`: expected `object`, got `str`")
_NO_REFERENCE = (
    "--map reference=FIELD of `polarctl convert` names a good answer; --no-reference does without"
)
_ID = _says("Identity of the prompt; when absent, a hash of the prompt's text.")
_PROMPT = _says("The prompt: a string or a list of messages.")
_REFERENCE = _says("The reference trajectory: the answer to compare with.")
_REFERENCES = _says("Several in place of `reference`; --reference-pooling joins the rewards.")
_PRINCIPLE = _says("What makes a response good, for `--backend principle`.")
_WRAPPER = Meta(
    description="How prompt and answer are glued: `sft` (a newline between them, the default) for "
    "instructions, `pretrain` (nothing between them) for text to be continued."
)
_POLICY = _says("Name of the policy that wrote the text.")
_REFERENCE_POLICY = _says("Policy of `reference`: from `pair`, that of `chosen`.")
_CATEGORY = _says("Group for the rows of a report: a domain, a subset, a source.")
_LABEL = _says("True quality, where known: 1 or 0, a grade, or a boolean.")


class Prompt(Struct):
    """A question or a piece of text to continue. Read by `sample` and `rft`."""

    prompt: Annotated[Text, _PROMPT]
    id: Annotated[str | UnsetType, _ID] = UNSET
    reference: Annotated[Text | UnsetType, _REFERENCE] = UNSET
    wrapper: Annotated[Wrapper | UnsetType, _WRAPPER] = UNSET
    category: Annotated[str | UnsetType, _CATEGORY] = UNSET


class Trajectory(Struct):
    """What one policy wrote for one prompt. Written by `sample`, read by `pair`."""

    prompt: Annotated[Text, _PROMPT]
    output: Annotated[Text, _says("What the policy wrote, after cleaning.")]
    policy: Annotated[str, _POLICY]
    policy_group: Annotated[str | UnsetType, _says("The pool's `group`.")] = UNSET
    id: Annotated[str | UnsetType, _ID] = UNSET
    sample: Annotated[int | UnsetType, _says("Index among the policy's samples, from 0.")] = UNSET
    wrapper: Annotated[Wrapper | UnsetType, _WRAPPER] = UNSET
    finish_reason: Annotated[
        Literal["stop", "length"] | UnsetType,
        _says("`stop`: the policy ended its text; `length`: it was cut by the limit."),
    ] = UNSET
    cleaned: Annotated[
        list[Literal["loop", "incomplete", "refusal"]] | UnsetType,
        Meta(
            description="What cleaning did: `loop` cut at a repetition, `incomplete` cut back to "
            "the last whole sentence. `refusal`: the text is nothing but one, and was kept."
        ),
    ] = UNSET
    num_tokens: Annotated[int | UnsetType, _says("Tokens generated, before cleaning.")] = UNSET
    language: Annotated[str | UnsetType, _says("ISO 639-1 code, with `--language`.")] = UNSET
    category: Annotated[str | UnsetType, _CATEGORY] = UNSET


class Triple(Struct):
    """A reference, a better and a worse candidate. Read by `pretrain`, `finetune`, `score`."""

    prompt: Annotated[Text, _PROMPT]
    reference: Annotated[Text, _REFERENCE]
    chosen: Annotated[Text, _says("The candidate that is closer to the reference.")]
    rejected: Annotated[Text, _says("The candidate that is farther from it.")]
    negatives: Annotated[
        list[Text] | UnsetType, _says("Further rejected candidates, for `--negatives`.")
    ] = UNSET
    margin: Annotated[
        float | UnsetType,
        _says("By how much the reward of `chosen` should be the larger, in training."),
    ] = UNSET
    id: Annotated[str | UnsetType, _ID] = UNSET
    wrapper: Annotated[Wrapper | UnsetType, _WRAPPER] = UNSET
    policy: Annotated[
        str | UnsetType, _says("Policy of `chosen`; in pre-training of `reference` too.")
    ] = UNSET
    rejected_policy: Annotated[str | UnsetType, _says("Policy of `rejected`.")] = UNSET
    reference_policy: Annotated[str | UnsetType, _REFERENCE_POLICY] = UNSET
    category: Annotated[str | UnsetType, _CATEGORY] = UNSET


class NamedCandidate(Struct):
    """One candidate of a group."""

    output: Annotated[Text, _says("The candidate's text.")]
    name: Annotated[str | UnsetType, _says("Who wrote it, or any name.")] = UNSET
    label: Annotated[float | bool | None | UnsetType, _LABEL] = UNSET


class Candidate(Struct):
    """What `score` reads: a single `output`, or a group of `candidates`, for one prompt."""

    prompt: Annotated[Text, _PROMPT]
    reference: Annotated[Text | UnsetType, _REFERENCE] = UNSET
    references: Annotated[list[Text] | UnsetType, _REFERENCES] = UNSET
    principle: Annotated[str | UnsetType, _PRINCIPLE] = UNSET
    output: Annotated[Text | UnsetType, _says("The single candidate.")] = UNSET
    candidates: Annotated[list[NamedCandidate] | UnsetType, _says("The candidates.")] = UNSET
    label: Annotated[float | bool | None | UnsetType, _LABEL] = UNSET
    id: Annotated[str | UnsetType, _ID] = UNSET
    wrapper: Annotated[Wrapper | UnsetType, _WRAPPER] = UNSET
    category: Annotated[str | UnsetType, _CATEGORY] = UNSET


class Score(Candidate):
    """What `score` writes: the record it read and its reward or rewards."""

    reward: Annotated[
        float | UnsetType, _says("Raw reward of `output`: unbounded, higher is closer.")
    ] = UNSET
    rewards: Annotated[
        list[float] | UnsetType,
        _says("Raw rewards in the order of `candidates`; or of `chosen` and `rejected`."),
    ] = UNSET
    reference_rewards: Annotated[
        list[list[float | None]] | UnsetType, _says("Those by each of the `references`; or null.")
    ] = UNSET
    normalized: Annotated[
        float | list[float] | UnsetType,
        _says("With `--normalize`: `reward` or `rewards` on that scale."),
    ] = UNSET
    tokens: Annotated[
        int | list[int] | UnsetType,
        _says("With `--details`: tokens that the model read for each reward."),
    ] = UNSET
    truncated: Annotated[
        list[str | list[str]] | UnsetType,
        _says("With `--details`: pieces that were cut to fit, for each reward."),
    ] = UNSET
    floored: Annotated[
        str | list[str | None] | UnsetType,
        Meta(
            description="Why `reward`, or each of `rewards`, is the reward floor: `empty`, "
            "`unclosed` (in an unfinished thought), `cut_off`; null where the model gave it."
        ),
    ] = UNSET
    best: Annotated[int | UnsetType, _says("`--best-of-n`: index of the highest.")] = UNSET
    ranking: Annotated[list[str] | UnsetType, _says("A judge's, best first.")] = UNSET
    reasoning: Annotated[str | UnsetType, _says("A judge's, before it scored.")] = UNSET
    parse_status: Annotated[
        Literal["ok"] | UnsetType,
        _says("A judge's reply was read; a record without is rejected, never scored."),
    ] = UNSET
    chosen: Annotated[Text | UnsetType, _says("Better candidate of a triple.")] = UNSET
    rejected: Annotated[Text | UnsetType, _says("Worse candidate of a triple.")] = UNSET
    policy: Annotated[str | UnsetType, _POLICY] = UNSET
    rejected_policy: Annotated[str | UnsetType, _says("Policy of `rejected`.")] = UNSET
    reference_policy: Annotated[str | UnsetType, _REFERENCE_POLICY] = UNSET


class Verdict(Struct):
    """What `eval` says of one comparison: a better and a worse candidate for one prompt."""

    id: Annotated[str, _says("Identity of the prompt.")]
    correct: Annotated[bool, _says("The better candidate has the higher reward.")]
    margin: Annotated[float, _says("Reward of the better minus that of the worse.")]
    rewards: Annotated[list[float], _says("Rewards of the better and the worse.")]
    baselines: Annotated[
        dict[str, float], _says("Baseline name to 1 (right), 0.5 (cannot tell) or 0 (wrong).")
    ]
    category: Annotated[str | UnsetType, _CATEGORY] = UNSET
    better: Annotated[str | UnsetType, _says("Name of the better candidate.")] = UNSET
    worse: Annotated[str | UnsetType, _says("Name of the worse candidate.")] = UNSET
    where: Annotated[str | UnsetType, _says("`file:line` of the scored record.")] = UNSET
    texts: Annotated[
        dict[str, Text | dict[str, str | int]],
        Meta(
            description="`prompt`, `better`, ...; with `--no-text` the `hash` and `length` of each."
        ),
    ] = {}


class PoolPolicy(Struct, forbid_unknown_fields=True):
    """One policy of a pool file. Read by `sample --pool`; its sampling overrides the options."""

    policy: Annotated[str, _says("Unique name of the policy, written to trajectories.")]
    model: Annotated[
        str,
        _says(
            "Folder or Hub id of a causal language model, or its name on a server. A pattern "
            "(`run/step-*`) makes a policy of each folder, named `policy`-`folder`."
        ),
    ]
    kind: Annotated[
        Literal["base", "chat"] | UnsetType,
        _says(
            "`base` continues the text (wrapper `pretrain`); `chat` answers through the chat "
            "template (wrapper `sft`). Default: `chat` if the tokenizer has one, else `base`."
        ),
    ] = UNSET
    backend: Annotated[
        Literal["transformers", "vllm", "openai"] | UnsetType,
        _says("What runs it: transformers (default), vLLM, or the server at `url`."),
    ] = UNSET
    url: Annotated[str | UnsetType, _says("Address of an OpenAI-compatible server.")] = UNSET
    engine: Annotated[
        dict[str, Any] | UnsetType,
        _says("Arguments of vLLM's engine, or further fields of each request to a server."),
    ] = UNSET
    revision: Annotated[str | UnsetType, _says("Commit, tag or branch of a Hub id.")] = UNSET
    dtype: Annotated[_Dtype | UnsetType, _says("Precision of computing.")] = UNSET
    group: Annotated[str | UnsetType, _says("Any name; `policy_group` of trajectories.")] = UNSET
    temperature: Annotated[_Above0 | UnsetType, _says("Sampling temperature.")] = UNSET
    top_p: Annotated[_Share | UnsetType, _says("Nucleus share.")] = UNSET
    top_k: Annotated[Annotated[int, Meta(ge=0)] | UnsetType, _says("Tokens kept; 0: all.")] = UNSET
    max_new_tokens: Annotated[_From1 | UnsetType, _says("Length limit in tokens.")] = UNSET
    samples: Annotated[_From1 | UnsetType, _says("Samples per prompt.")] = UNSET
    weight: Annotated[
        _Share | UnsetType, _says("Share of the prompts that it answers; default 1: all.")
    ] = UNSET


class Estimate(Struct):
    """A figure with its 95 % interval."""

    value: Annotated[float, _says("The figure.")]
    low: Annotated[float, _says("Lower end of the interval.")]
    high: Annotated[float, _says("Upper end of the interval.")]
    n: Annotated[int, _says("Cases behind the figure.")]
    clusters: Annotated[int | UnsetType, _says("Prompts: what is drawn.")] = UNSET


Figures = dict[str, Estimate]  # scorer (the model or a baseline) to figure


class BenchmarkResult(Struct):
    """A public benchmark's own score."""

    name: Annotated[str, _says("The benchmark, as in `--benchmark`.")]
    overall: Annotated[float, _says("Its one figure, a fraction.")]
    sections: Annotated[dict[str, float], _says("Its own sections: fractions.")]
    counts: Annotated[dict[str, int], _says("Items behind each section.")]
    rows: Annotated[int, _says("Rows that count.")]
    intervals: Annotated[
        dict[str, list[float]], _says("95 % interval, its two ends, of `overall` and each section.")
    ]
    details: Annotated[
        dict[str, dict[str, float]],
        _says("Finer figures by kind: subsets, languages, levels of a domain."),
    ] = {}
    missing: Annotated[list[str], _says("Sections without rows, not in `overall`.")] = []
    left_out: Annotated[dict[str, int], _says("Why rows do not count: how many.")] = {}
    references: Annotated[dict[str, int], _says("Where they are from: rows.")] = {}


class Report(Struct):
    """The summary that `eval` writes as report.json."""

    metric: Annotated[str, _says("What is measured: preference accuracy, ...")]
    overall: Annotated[Figures, _says("Scorer (the model or a baseline) to figure.")]
    categories: Annotated[dict[str, Figures], _says("The same for every category.")]
    margins: Annotated[dict[str, float], _says("Their quantiles: min, p25, ..., max.")]
    best_of_n: Annotated[
        Figures | UnsetType,
        _says("Mean label of the candidate that each scorer ranks first (groups)."),
    ] = UNSET
    best_of_n_decided: Annotated[
        Figures | UnsetType,
        _says("The same over groups with different labels: not all right or all wrong."),
    ] = UNSET
    calibration: Annotated[
        dict[str, float | list[dict[str, float]]] | UnsetType,
        _says("`ece`, and `bins` of confidence, accuracy, n; see the guide."),
    ] = UNSET
    length_bias: Annotated[
        dict[str, float | Estimate] | UnsetType,
        _says("`correlation`; accuracy where `longer_is_worse`, `longer_is_better`."),
    ] = UNSET
    ranking: Annotated[
        dict[str, Figures] | UnsetType,
        Meta(
            description="`kendall_tau_b` and `ndcg` of each scorer's order, over groups of three "
            "candidates or more."
        ),
    ] = UNSET
    benchmark: Annotated[BenchmarkResult | UnsetType, _says("By its own formula.")] = UNSET
    discrimination: Annotated[
        dict[str, Any] | UnsetType,
        _says("Of triples between policies: `parts`, `matrix`, `distance`."),
    ] = UNSET
    reference_agreement: Annotated[
        Figures | UnsetType, _says("`same_order`, `kendall_tau_b` of two of the `references`.")
    ] = UNSET
    skipped: Annotated[dict[str, int], _says("Reason to records without a comparison.")] = {}


class OutputFile(Struct):
    """A file named by a manifest."""

    sha256: Annotated[str, _says("Hash of the file's bytes.")]
    bytes: Annotated[int, _says("Size in bytes.")]
    path: Annotated[str | None | UnsetType, _says("Path; null for a pipe.")] = UNSET
    records: Annotated[int | UnsetType, _says("Lines, for JSONL.")] = UNSET


class InputFile(Struct):
    """An input named by a manifest."""

    path: Annotated[str, _says("Path, or `-` for standard input.")]
    bytes: Annotated[int | None, _says("Size in bytes; null for a pipe.")]
    sha256: Annotated[str | UnsetType, _says("Hash of its bytes, where taken.")] = UNSET


class Manifest(Struct):
    """Provenance, beside every output. It is written last: its presence means complete."""

    schema_version: Annotated[int, _says("Version of these record schemas.")]
    stage: Annotated[str, _says("The subcommand that made the output.")]
    version: Annotated[str, _says("Version of polarctl.")]
    config: Annotated[dict[str, Any], _says("Every option, as resolved.")]
    inputs: Annotated[list[InputFile], _says("What was read.")]
    outputs: Annotated[dict[str, OutputFile], _says("File name to what was written.")]
    counts: Annotated[dict[str, Any], _says("What was counted: records, rejects, ...")]
    choices: Annotated[dict[str, dict[str, str]], _says("Automatic choices: `{value, reason}`.")]
    environment: Annotated[dict[str, str], _says("Versions, platform, host, times.")]
    fingerprint: Annotated[
        dict[str, Any] | UnsetType, _says("What a resume must find unchanged.")
    ] = UNSET


KINDS: dict[str, type[Struct]] = {
    "prompt": Prompt,
    "trajectory": Trajectory,
    "triple": Triple,
    "candidate": Candidate,
    "score": Score,
    "verdict": Verdict,
    "report": Report,
    "manifest": Manifest,
    "pool": PoolPolicy,
}


def check(fields: dict[str, Any], kind: type[Struct]) -> None:
    """Raise RecordError when `fields` is not a record of the kind.

    The error has no place; whoever knows file and line adds it.
    """
    try:
        msgspec.convert(fields, kind)
    except msgspec.ValidationError as error:
        reason, hint = _readable(str(error)), None
        if kind is Triple and reason == "missing field `reference`":
            hint = _NO_REFERENCE
        elif kind is Candidate and _TEXT_FOR_OBJECT.match(reason):
            hint = "`polarctl convert` reads candidates that are plain texts"
        elif reason.startswith("missing field `"):
            hint = _renamed(reason.split("`")[1], fields)
        raise RecordError(reason, hint=hint) from None
    if kind is Candidate and ("output" in fields) == ("candidates" in fields):
        raise RecordError("needs either `output` or `candidates`")
    if kind is Candidate and "candidates" in fields and not fields["candidates"]:
        raise RecordError("`candidates` is empty")


# What other people call a field.
_ALIASES = {
    "prompt": "question instruction input query problem text",
    "reference": "ground_truth gold target solution answer",
    "output": "response answer completion generation",
    "chosen": "preferred better accepted chosen_response",
    "rejected": "other worse dispreferred rejected_response",
}


def _renamed(name: str, fields: dict[str, Any]) -> str | None:
    """How a field that is missing can be had, if people know it by another name."""
    if name not in _ALIASES:
        return None
    found = next((other for other in _ALIASES[name].split() if other in fields), "FIELD")
    return f"`polarctl convert --map {name}={found}` renames a field"


def _readable(message: str) -> str:
    """`Object missing required field `x`` -> `missing field `x``; `$.a[...]` -> field `a`."""
    text = message.replace("Object missing required field", "missing field")
    text, _, path = text.partition(" - at `$")
    path = path.rstrip("`").lstrip(".")
    text = text[0].lower() + text[1:]
    return f"field `{path}`: {text}" if path else text


def kind_of(fields: dict[str, Any]) -> str:
    """The kind of record that the fields look like, for `validate` and `score`.

    Raises:
        RecordError: Nothing fits.
    """
    if "chosen" in fields and "rejected" in fields:
        return "score" if "rewards" in fields else "triple"
    if "reward" in fields or "rewards" in fields:
        return "verdict" if "margin" in fields else "score"
    if "candidates" in fields:
        return "candidate"
    if "output" in fields:
        return "trajectory" if "policy" in fields else "candidate"
    if "model" in fields and "policy" in fields:
        return "pool"
    if "prompt" in fields:
        return "prompt"
    raise RecordError("no known kind of record (no `prompt`, `output`, `chosen`, ...)")


def find_kind(name: str) -> type[Struct]:
    """The class of a kind by name.

    Raises:
        UsageError: No such kind; names the nearest.
    """
    if name not in KINDS:
        import difflib

        near = difflib.get_close_matches(name, KINDS, 1)
        hint = f"did you mean `{near[0]}`?" if near else f"one of: {', '.join(KINDS)}"
        raise UsageError(f"no schema named `{name}`", hint=hint)
    return KINDS[name]


def prompt_id(fields: dict[str, Any]) -> str:
    """The record's `id`, or 16 hex digits of a hash of its prompt."""
    given = fields.get("id")
    if isinstance(given, str) and given:
        return given
    prompt = fields["prompt"]
    raw = prompt if isinstance(prompt, str) else msgspec.json.encode(prompt, order="sorted")
    data = raw.encode("utf-8", "surrogatepass") if isinstance(raw, str) else raw
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def kind_of_scorable(fields: dict[str, Any]) -> str:
    """`triple` for records with chosen and rejected and no group, else `candidate`."""
    pair = "chosen" in fields and "rejected" in fields
    return "triple" if pair and "candidates" not in fields else "candidate"


def outputs_of(record: dict[str, Any]) -> list[Any]:
    """The candidates of a record: its group, its pair (chosen, rejected), or its one output."""
    if "candidates" in record:
        return [candidate["output"] for candidate in record["candidates"]]
    if "chosen" in record and "rejected" in record:
        return [record["chosen"], record["rejected"]]
    return [record["output"]]
