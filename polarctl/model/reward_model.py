"""The reward model: a causal LM's backbone and a scalar head, in the architecture's own class.

A checkpoint is a plain `...ForSequenceClassification` with one label and the problem type
"regression", so transformers, vLLM, SGLang and TRL load it without any code of ours. Its
`config.json` carries the input template under `polar` and the id of the reward token.

Shapes: B sequences, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from polarctl import console
from polarctl.errors import MissingError, UsageError
from polarctl.model.conversation import ChatEncoder
from polarctl.model.head import head
from polarctl.model.internlm2 import classifier
from polarctl.model.internlm2 import config as internlm2
from polarctl.model.internlm2 import tokenizer as internlm2_tokenizer
from polarctl.model.positions import kind_of_length, of_own_length
from polarctl.model.template import Encoder
from polarctl.storage import manifest
from polarctl.storage.atomic import open_to_umask

MAX_LENGTH = 16384
SEPARATOR, REWARD_TOKEN = "<|reward|>", "[UNUSED_TOKEN_130]"


@dataclass
class PolarModel:
    """A sequence classifier with one label, its tokenizer and its template.

    Attributes:
        model: The transformers model; `model.base_model` is the backbone, `model.score` the head.
        tokenizer: Its tokenizer.
        encoder: Text to token ids, as the checkpoint was trained.
        new_tokens: Ids of template tokens whose embeddings nothing has trained yet.
    """

    model: Any
    tokenizer: Any
    encoder: Encoder | ChatEncoder
    new_tokens: tuple[int, ...] = ()

    @property
    def no_reference(self) -> bool:
        """Whether it was trained with empty references."""
        return bool(getattr(self.model.config, "polar_no_reference", False))

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.device

    def save(self, folder: str | Path, weights: dict[str, Tensor] | None = None) -> None:
        """Write config, weights and tokenizer; files get the permissions of the umask.

        Args:
            folder: Where to.
            weights: In place of the model's own, such as were gathered from several processes.
        """
        dtype = None if weights is None else next(iter(weights.values())).dtype
        self.model.save_pretrained(folder, state_dict=weights)
        if dtype is not None:  # the config speaks of the model's own
            self.model.config.dtype = dtype
            self.model.config.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        open_to_umask(Path(folder))


def pad(sequences: Sequence[Sequence[int]], pad_id: int, device: Any) -> tuple[Tensor, Tensor]:
    """Right-pad token ids.

    Returns:
        Ids and mask, both Shape: (B, T), on `device`.
    """
    length = max(map(len, sequences))
    ids = torch.full((len(sequences), length), pad_id)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.as_tensor(sequence)
        mask[row, : len(sequence)] = 1
    return ids.to(device), mask.to(device)


def rewards(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """Rewards of right-padded sequences, read at each one's last token.

    Args:
        model: A `...ForSequenceClassification` (or its wrapper for distribution).
        ids: Token ids. Shape: (B, T).
        mask: 1 for tokens, 0 for padding. Shape: (B, T).

    Returns:
        Shape: (B,), at least float32.
    """
    last = mask.sum(1) - 1
    kind = kind_of_length(model.config)
    rows = torch.arange(len(ids), device=ids.device)
    own: Any = nullcontext()
    if kind is not None:
        owner = torch.where(mask.bool(), rows[:, None], -1)
        own = of_own_length(model, [kind(at + 1) for at in last.tolist()], owner)
    with own:
        hidden = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)[0]
    return head(model, hidden[rows, last])


# -- loading --------------------------------------------------------------------------------------


def load_tokenizer(path: str, revision: str | None = None) -> Any:
    """A tokenizer from a folder or the Hub; `revision` is a commit, tag or branch there.

    Raises:
        MissingError: There is none.
    """
    released = internlm2.read(path)
    if released is not None:
        return internlm2_tokenizer.load(path, released.get("reward_token_id"))
    try:
        return transformers.AutoTokenizer.from_pretrained(
            path, revision=revision or "main", trust_remote_code=False
        )
    except Exception as error:  # transformers raises OSError, ValueError, KeyError, ... for this
        raise MissingError(
            f"{path}: no tokenizer that can be loaded ({first_line(error)})",
            hint="save the tokenizer into the model's folder, or pass --tokenizer",
        ) from None


def load_config(path: str, *, weights: bool = True, revision: str | None = None) -> Any:
    """A model's config from a folder, a config file or the Hub.

    Args:
        path: Folder, file or Hub id.
        weights: They are about to be read too, so all files have to be those of the manifest.
        revision: Commit, tag or branch of a Hub id; None for its newest.

    Raises:
        MissingError: There is none, or it needs code from the folder.
        UsageError: It is an InternLM2's, and of a kind that is not supported; or the files of the
            folder are not those that its manifest names.
    """
    if weights:
        manifest.check_model(path)
    released = internlm2.read(path)
    if released is not None:
        return internlm2.to_llama(released)
    try:
        return transformers.AutoConfig.from_pretrained(
            path, revision=revision or "main", trust_remote_code=False
        )
    except Exception as error:  # the same kinds as for a tokenizer
        raise MissingError(
            f"{path}: no model that can be loaded ({first_line(error)})",
            hint="a folder with config.json and model.safetensors, or a Hub id",
        ) from None


def load(
    path: str, *, device: str = "cpu", dtype: Any = torch.float32, as_polar: bool = False
) -> PolarModel:
    """A trained POLAR model.

    Args:
        path: Folder or Hub id.
        device: Where the weights go; `meta`: none are read, and none have to be there.
        dtype: Their precision.
        as_polar: It reads POLAR's template, whatever its files say.

    Raises:
        MissingError: No model, tokenizer or reward head there.
        UsageError: It reads conversations.
    """
    config, tokenizer = _without_weights(path, checked=device != "meta", as_polar=as_polar)
    if device == "meta":
        model = from_config(config, dtype, device)
    else:
        model = classifier_of(path, config, dtype, head=True)
    return PolarModel(model.to(device).eval(), tokenizer, _encoder(path, config, tokenizer))


def load_encoder(path: str) -> Encoder:
    """The template of a trained reward model, for an engine that holds the weights elsewhere.

    Raises:
        MissingError: No tokenizer or reward head there.
        UsageError: It reads conversations.
    """
    return _encoder(path, *_without_weights(path))


def limits(path: str) -> tuple[int, int] | None:
    """Tokens of one input and of one response that a reward model reads; None: it does not say."""
    try:
        template: Any = getattr(load_config(path, weights=False), "polar", None)
        if template is None and internlm2.read(path) is not None:
            template = internlm2.TEMPLATE
        return int(template["max_length"]), int(template["max_response_length"])
    except (MissingError, UsageError, KeyError, TypeError, ValueError):
        return None


def reads_chat(path: str, config: Any, tokenizer: Any) -> bool:
    """Whether a checkpoint is a reward model that reads conversations.

    A model of ours has `polar` in its config.json, and a published POLAR model is an InternLM2. Of
    those a chat template says nothing: a POLAR model may have inherited one.
    """
    if getattr(config, "polar", None) is not None or internlm2.read(path) is not None:
        return False
    classifies = is_classifier(config) and config.num_labels == 1
    return classifies and bool(getattr(tokenizer, "chat_template", None))


def _without_weights(path: str, *, checked: bool = True, as_polar: bool = False) -> tuple[Any, Any]:
    """Config and tokenizer of a reward model, with its other files looked at or not."""
    config = load_config(path, weights=checked)
    tokenizer = load_tokenizer(path)
    if not as_polar and reads_chat(path, config, tokenizer):
        raise UsageError(
            f"{path}: reads conversations in a chat template, and here a POLAR model is needed",
            hint="score, eval and serve read it by transformers, rft as `--reward rm:PATH`",
        )
    if getattr(config, "num_labels", None) != 1 or not is_classifier(config):
        raise MissingError(
            f"{path}: has no reward head", hint="`polarctl pretrain` and `finetune` make one"
        )
    if getattr(config, "polar", None) is None and internlm2.read(path) is not None:
        config.polar = internlm2.template(config, tokenizer)
        console.choice("template", "official", f"`{path}` is a published checkpoint")
    return config, tokenizer


def create(
    *,
    base: str | None = None,
    config_path: str | None = None,
    tokenizer_path: str | None = None,
    max_length: int | None = None,
    max_response_length: int | None = None,
    default_response_length: int = 4096,
    cut_side: str | None = None,
    device: str = "cpu",
    dtype: Any = torch.float32,
    seed: int = 0,
) -> PolarModel:
    """A reward model to be trained.

    A causal LM gets a zero head and the two template tokens; a reward model goes on with its
    weights, its tokenizer and its template, in which lengths can be changed; a config alone gives
    random weights.

    Args:
        base: Folder or Hub id of a causal LM or of a reward model.
        config_path: Instead of `base`: a config for random weights.
        tokenizer_path: Tokenizer, where the model has none or another is wanted; not for a reward
            model.
        max_length: Tokens of one input, or None: a reward model's own, else 16384 or what the model
            can take.
        max_response_length: Tokens of one response, or None: a reward model's own or the default.
        default_response_length: That default; a quarter of `max_length` where that is less.
        cut_side: Where long responses are cut, or None: a reward model's own or `right`.
        device: Where the weights go; `meta`: the shapes alone, and no weights are read.
        dtype: Their precision.
        seed: Seed of random weights.

    Raises:
        UsageError: Neither or both of `base` and `config_path`; lengths that do not fit; a
            tokenizer for a reward model.
        MissingError: Model or tokenizer is not there.
    """
    if (base is None) == (config_path is None):
        raise UsageError(
            "pass either `--model` or `--init-from-config`", hint="-m FOLDER, or a Hub id"
        )
    source = base or config_path
    assert source is not None
    config = load_config(source, weights=device != "meta")
    trained = getattr(config, "polar", None) or internlm2.read(source)
    longest = getattr(config, "max_position_embeddings", None) or math.inf
    if max_length is not None and max_length > longest:
        raise UsageError(f"`--max-length {max_length}`: {source} takes {longest} tokens at most")
    given: dict[str, Any] = {
        "max_length": max_length,
        "max_response_length": max_response_length,
        "cut_side": cut_side,
    }
    given = {name: value for name, value in given.items() if value is not None}
    if base is not None and is_classifier(config) and trained:
        if tokenizer_path is not None:
            raise UsageError(
                f"`--tokenizer`: {base} is a reward model and keeps its own",
                hint="leave it out",
            )
        return _retold(load(base, device=device, dtype=dtype), base, given)
    tokenizer = load_tokenizer(tokenizer_path or source)
    added = _add_tokens(tokenizer)
    config.num_labels, config.problem_type = 1, "regression"
    config.pad_token_id = tokenizer.pad_token_id
    model = with_all_tokens(
        base, config, tokenizer, head=False, device=device, dtype=dtype, seed=seed
    )
    torch.nn.init.zeros_(model.score.weight)  # the first loss is ln 2
    total = int(given.get("max_length", min(MAX_LENGTH, longest)))
    template = {
        "separator": SEPARATOR,
        "reward_token": REWARD_TOKEN,
        "max_length": total,
        "max_response_length": min(default_response_length, total // 4),
        "cut_side": "right",
        **given,
    }
    model.config.polar = template
    model.config.reward_token_id = tokenizer.convert_tokens_to_ids(REWARD_TOKEN)
    model.config.pad_token_id = tokenizer.pad_token_id
    encoder = _encoder(source, model.config, tokenizer)
    new = tuple(tokenizer.convert_tokens_to_ids(added))
    return PolarModel(model.to(device), tokenizer, encoder, new)


def _retold(made: PolarModel, path: str, given: dict[str, Any]) -> PolarModel:
    """A reward model whose template has other lengths; said, and saved with it."""
    before = made.model.config.polar
    changed = {name: value for name, value in given.items() if value != before.get(name)}
    if not changed:
        return made
    if "template" not in console.choices():  # a model may be loaded again at the end
        console.choice(
            "template",
            ", ".join(f"{name} {value}" for name, value in changed.items()),
            f"asked for; {path} was trained with "
            + ", ".join(f"{name} {before.get(name)}" for name in changed),
        )
    made.model.config.polar = {**before, **changed}
    made.encoder = _encoder(path, made.model.config, made.tokenizer)
    return made


def with_all_tokens(
    base: str | None,
    config: Any,
    tokenizer: Any,
    *,
    head: bool,
    device: str,
    dtype: Any,
    seed: int,
) -> Any:
    """A classifier to be trained, with an embedding for every token of its tokenizer.

    Args:
        base: Folder or Hub id of its weights, or None: random ones.
        config: Its config; without `base` its vocabulary may grow.
        tokenizer: Its tokenizer.
        head: The reward head has to be among the weights.
        device: `meta`: the shapes alone, and no weights are read.
        dtype: Precision of the weights.
        seed: Seed of what is random.

    Raises:
        MissingError: It cannot be loaded, or weights are missing.
    """
    torch.manual_seed(seed)
    if base is None:
        config.vocab_size = max(config.vocab_size, len(tokenizer))
    if base is None or device == "meta":
        model = from_config(config, dtype, device)
    else:
        model = classifier_of(base, config, dtype, head=head)
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        # New rows drawn around the mean of the old ones need the old ones.
        model.resize_token_embeddings(len(tokenizer), mean_resizing=device != "meta")
    return model


def is_classifier(config: Any) -> bool:
    """Whether a config is that of a sequence classifier."""
    named = config.architectures
    return isinstance(named, list) and any("SequenceClassification" in str(name) for name in named)


def classifier_of(path: str, config: Any, dtype: Any, *, head: bool) -> Any:
    """A sequence classifier; with `head` its reward head must be among its weights.

    Raises:
        MissingError: It cannot be loaded, or weights are missing.
    """
    model, absent = load_classifier(path, config, dtype)
    missing = set(absent) - (set() if head else {"score.weight"})
    if missing:
        raise MissingError(
            f"{path}: weights are missing: {', '.join(sorted(missing)[:3])}"
            + (f" and {len(missing) - 3} more" if len(missing) > 3 else ""),
            hint="`polarctl pretrain` and `finetune` write the reward head `score.weight`",
        )
    return model


def load_classifier(path: str, config: Any, dtype: Any) -> tuple[Any, list[str]]:
    """A sequence classifier and the names of weights that its files lack; runs no code from them.

    Args:
        path: Folder or Hub id, in transformers' layout or in InternLM2's.
        config: Its config.
        dtype: Precision.

    Raises:
        MissingError: It cannot be loaded.
    """
    if internlm2.read(path) is not None:
        return classifier.load(path, config, dtype)
    try:
        model, info = transformers.AutoModelForSequenceClassification.from_pretrained(
            path,
            config=config,
            dtype=dtype,
            trust_remote_code=False,
            output_loading_info=True,
            use_safetensors=True,
        )
    except Exception as error:  # the same kinds as for a tokenizer
        raise MissingError(
            f"{path}: the model cannot be loaded ({first_line(error)})",
            hint="a folder with config.json and model.safetensors, or a Hub id",
        ) from None
    refuse_unread(path, config, info["unexpected_keys"])
    return model, info["missing_keys"]


def refuse_unread(path: str, config: Any, names: Iterable[str]) -> None:
    """Weights that the config has no place for: a fault of a classifier, worth a word of another.

    Raises:
        MissingError: A classifier has some; without them it would give other rewards.
    """
    unread = sorted(name for name in names if not name.startswith("lm_head"))
    if not unread:
        return
    what = f"{path}: its config.json has no place for {len(unread):,} weights, such as {unread[0]}"
    if is_classifier(config):
        raise MissingError(what, hint="config.json and the weights are of different models")
    console.warn(f"{what}; they are left out")


def from_config(config: Any, dtype: Any, device: str = "cpu") -> Any:
    """A classifier with random weights; on `meta` without any."""
    with torch.device("meta") if device == "meta" else nullcontext():
        model = transformers.AutoModelForSequenceClassification.from_config(config)
    return model.to(dtype)


def _add_tokens(tokenizer: Any) -> list[str]:
    """Give the tokenizer what the template needs; the tokens that are new to it."""
    tokens = [t for t in (SEPARATOR, REWARD_TOKEN) if t not in tokenizer.get_vocab()]
    tokenizer.add_tokens(tokens, special_tokens=True)
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is not None:
            tokenizer.pad_token = tokenizer.eos_token
        else:
            tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    tokenizer.padding_side = "right"
    return tokens


def _encoder(path: str, config: Any, tokenizer: Any) -> Encoder:
    template = getattr(config, "polar", None)
    if template is None:
        template = {}
        console.choice("template", "official", f"`{path}` names none in its config.json")
    try:
        if not isinstance(template, dict):
            raise TypeError("it is no object")
        for name, value in template.items():
            if type(value) is not (int if name.startswith("max_") else str):
                raise TypeError(f"`{name}` is {str(value)[:40]!r}")
        return Encoder(tokenizer, **template)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{path}: its template does not work: {error}") from None


def first_line(error: Exception) -> str:
    """What a library says is wrong, short enough for one of our lines."""
    text = str(error).strip().splitlines()
    return text[0].rstrip(".")[:200] if text else type(error).__name__
