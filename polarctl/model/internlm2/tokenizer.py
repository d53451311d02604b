"""The tokenizer of an InternLM2 checkpoint, without the code that is published with it.

From `tokenizer.json`, or else built from sentencepiece's `tokenizer.model` and the added tokens of
`tokenizer_config.json`. As in the published tokenizer, text is split at added tokens, and each part
is tokenized as sentencepiece would tokenize it alone: with a space before it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from polarctl.errors import MissingError
from polarctl.model.internlm2 import pieces
from polarctl.model.internlm2.files import folder_of
from polarctl.model.internlm2.pieces import Pieces

_SPACE = "\u2581"
_NAMED = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}


def load(path: str, reward_token_id: int | None = None) -> PreTrainedTokenizerFast:
    """The tokenizer of a checkpoint.

    Args:
        path: Folder or Hub id.
        reward_token_id: Id of the reward token, which is made one token wherever it is spelled.

    Raises:
        MissingError: There is none, or its files contradict each other.
    """
    folder = folder_of(path, weights=False)
    settings = _json(folder / "tokenizer_config.json")
    added = _added_tokens(settings)
    if (folder / "tokenizer.json").is_file():
        core = _from_json(folder / "tokenizer.json")
    elif (folder / "tokenizer.model").is_file():
        core = build(pieces.read(folder / "tokenizer.model"), added)
    else:
        raise MissingError(f"{path}: no tokenizer", hint="tokenizer.json or tokenizer.model")
    for index, token in added.items():
        if core.token_to_id(token.content) != index:
            raise MissingError(
                f"{path}: tokenizer_config.json gives `{token.content}` the id {index}, the "
                f"tokenizer {core.token_to_id(token.content)}"
            )
    if reward_token_id is not None:
        text = core.id_to_token(reward_token_id)
        if text is None:
            raise MissingError(f"{path}: the tokenizer has no id {reward_token_id}, the reward's")
        if reward_token_id not in core.get_added_tokens_decoder():
            core.add_special_tokens([AddedToken(text, normalized=False, special=True)])
    return _wrapped(core, settings, folder)


def build(model: Pieces, added: dict[int, AddedToken]) -> Tokenizer:
    """A tokenizer with the ids of a sentencepiece model.

    Args:
        model: The sentencepiece model.
        added: Tokens at which text is split, by id; one may take a piece's place.
    """
    texts = [piece.text for piece in model.pieces]
    for index, token in added.items():
        if index < len(texts):
            texts[index] = token.content
    fixed = [
        piece.text
        for index, piece in enumerate(model.pieces)
        if piece.kind == pieces.USER_DEFINED and index not in added
    ]
    vocab = {text: index for index, text in enumerate(texts)}
    merges = _merges(model, added)

    def bpe(*, whole: bool) -> BPE:
        return BPE(
            vocab=vocab,
            merges=merges,
            unk_token=texts[model.unk_id],
            fuse_unk=True,
            byte_fallback=model.byte_fallback,
            ignore_merges=whole,
        )

    core = Tokenizer(bpe(whole=bool(fixed)))
    steps: list[Any] = []
    if model.charsmap:
        steps.append(normalizers.Precompiled(model.charsmap))
    if model.squeeze:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if model.dummy_prefix:
        steps.append(normalizers.Prepend(_SPACE))
    core.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])
    if fixed:
        # No merge makes a fixed piece: it is cut out, and what is a piece is looked up whole.
        cuts = [_any_of(map(_escaped, sorted(fixed, key=len, reverse=True)))]
        spelled = [text for index, text in enumerate(texts) if index not in added]
        cuts += _apart(Tokenizer(bpe(whole=False)), sorted(set(spelled) - set(fixed)))
        core.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(cut), "isolated") for cut in cuts]
        )
    strip = [decoders.Strip(content=" ", left=1)] if model.dummy_prefix else []
    spaces = decoders.Replace(_SPACE, " ")
    core.decoder = decoders.Sequence([spaces, decoders.ByteFallback(), decoders.Fuse(), *strip])
    for _, token in sorted(added.items()):
        core.add_special_tokens([token]) if token.special else core.add_tokens([token])
    return core


def _merges(model: Pieces, added: dict[int, AddedToken]) -> list[tuple[str, str]]:
    """Every pair that makes a piece, the piece with the highest score first."""
    scores = {
        piece.text: (-piece.score, index)
        for index, piece in enumerate(model.pieces)
        if piece.kind == pieces.NORMAL and index not in added
    }
    pairs = [
        (rank, at, (text[:at], text[at:]))
        for text, rank in scores.items()
        for at in range(1, len(text))
        if text[:at] in scores and text[at:] in scores
    ]
    return [pair for _, _, pair in sorted(pairs)]


def _apart(merging: Tokenizer, texts: list[str]) -> list[str]:
    """Where to cut a part that spells a piece which merges do not make, such as `<0x0A>`.

    Looked up whole it would be that piece. Cut where merges leave a border, its halves get the ids
    that merges give; a half must not be such a piece again.
    """
    split = {
        text: [end for _, end in made.offsets[:-1]]
        for text, made in zip(texts, merging.encode_batch(texts), strict=True)
        if len(made.ids) > 1
    }
    found = []
    for text, borders in split.items():
        halves = [(text[:at], text[at:]) for at in borders if 0 < at < len(text)]
        good = [pair for pair in halves if not any(half in split for half in pair)] or halves
        found += [f"{_escaped(start)}(?={_escaped(end)}\\z)" for start, end in good[:1]]
    return [rf"\A{_any_of(found)}"] if found else []


def _any_of(patterns: Iterable[str]) -> str:
    return f"(?:{'|'.join(patterns)})"


def _escaped(text: str) -> str:
    return "".join(c if c.isalnum() or ord(c) > 127 else f"\\x{{{ord(c):x}}}" for c in text)


def _from_json(path: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises Exception itself
        raise MissingError(f"{path}: is no tokenizer ({error})") from None


def _wrapped(core: Tokenizer, settings: dict[str, Any], folder: Path) -> PreTrainedTokenizerFast:
    named = {key: _content(settings.get(key, default)) for key, default in _NAMED.items()}
    named = {key: token for key, token in named.items() if token in core.get_vocab()}
    start = named.get("bos_token") if settings.get("add_bos_token", True) else None
    end = named.get("eos_token") if settings.get("add_eos_token", False) else None
    ends = [token for token in (start, end) if token is not None]
    # `:1` is the second text of a pair.
    one = " ".join([*([start] if start else []), "$A", *([end] if end else [])])
    core.post_processor = TemplateProcessing(
        single=one,
        pair=one + " " + " ".join(f"{part}:1" for part in one.replace("$A", "$B").split()),
        special_tokens=[(token, core.token_to_id(token)) for token in dict.fromkeys(ends)],
    )
    chat = folder / "chat_template.jinja"
    # A template of the reward model decides how long an input may be, not the tokenizer.
    core.no_truncation()
    core.no_padding()
    spoken = chat.read_text(encoding="utf-8") if chat.is_file() else settings.get("chat_template")
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        **named,
        chat_template=spoken,
        clean_up_tokenization_spaces=False,
        padding_side="right",
    )


def _added_tokens(settings: dict[str, Any]) -> dict[int, AddedToken]:
    flags = ("lstrip", "rstrip", "single_word", "normalized", "special")
    return {
        int(index): AddedToken(token["content"], **{f: bool(token.get(f)) for f in flags})
        for index, token in (settings.get("added_tokens_decoder") or {}).items()
    }


def _content(token: Any) -> Any:
    return token.get("content") if isinstance(token, dict) else token


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_bytes())
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise MissingError(f"{path}: is no JSON object")
    return content
