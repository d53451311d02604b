"""Whole folders from the published format to ours, and back, every number as it was."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers

from polarctl.errors import MissingError, UsageError
from polarctl.model.internlm2 import classifier, config, layout, tokenizer
from polarctl.model.internlm2.files import SHARD_BYTES, WeightFiles, folder_of, write_shards
from polarctl.storage.atomic import open_to_umask

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)


def to_llama(source: str, target: str | Path, *, shard_bytes: int = SHARD_BYTES) -> None:
    """Write a published reward model as a plain `LlamaForSequenceClassification`.

    transformers, vLLM, SGLang and TRL load the folder without remote code. Nothing of the source is
    executed; the precision stays.

    Args:
        source: Folder or Hub id in InternLM2's format.
        target: A folder that is not there yet, or is empty.
        shard_bytes: Bytes of one weight file at most.

    Raises:
        UsageError: The target is taken, or the source is not a reward model of that format.
        MissingError: The source cannot be read, or its weights are not what its config says.
    """
    _read_config(source)
    released = config.read(source)
    if released is None:
        raise UsageError(
            f"{source}: is no InternLM2 checkpoint", hint="config.json names another `model_type`"
        )
    llama = config.to_llama(released)
    if "LlamaForSequenceClassification" not in llama.architectures:
        raise UsageError(
            f"{source}: has no reward head", hint="`polarctl pretrain --model` takes it as it is"
        )

    def write(folder: Path) -> None:
        text = tokenizer.load(source, llama.reward_token_id)
        if getattr(llama, "polar", None) is None:
            llama.polar = config.template(llama, text)
        llama.pad_token_id = text.pad_token_id
        classifier.say_rope(llama)
        files = WeightFiles(folder_of(source))
        wanted = layout.llama_weights(llama, head=True)
        files.require(layout.sources(wanted))
        write_shards(folder, classifier.made(wanted, files), shard_bytes)
        llama.save_pretrained(folder)
        text.save_pretrained(folder)

    _write_once(Path(target), write)


def to_internlm2(source: str, target: str | Path, *, shard_bytes: int = SHARD_BYTES) -> None:
    """Write one of our Llama reward models in the published layout; `to_llama` undone.

    The tokenizer's files are copied. There is no code in the folder: tools that know
    `InternLM2ForRewardModel` by themselves load it, and `to_llama` does.

    Args:
        source: Folder or Hub id of a Llama reward model with one label.
        target: A folder that is not there yet, or is empty.
        shard_bytes: Bytes of one weight file at most.

    Raises:
        UsageError: The target is taken, or the source is not a Llama reward model.
        MissingError: The source cannot be read, or its weights are not what its config says.
    """
    content = _read_config(source)
    kinds = content.get("architectures") or []
    if content.get("model_type") != "llama" or kinds != ["LlamaForSequenceClassification"]:
        raise UsageError(
            f"{source}: is no Llama reward model",
            hint="only a model of Llama's architecture has a place in InternLM2's layout",
        )
    llama = transformers.LlamaConfig.from_dict(content)
    if llama.num_labels != 1:
        raise UsageError(f"{source}: has {llama.num_labels} labels, a reward model has one")
    settings = config.to_internlm2(llama)

    def write(folder: Path) -> None:
        origin = folder_of(source)
        files = WeightFiles(origin)
        wanted = layout.internlm2_weights(llama)
        files.require(layout.sources(wanted))
        write_shards(folder, classifier.made(wanted, files), shard_bytes)
        text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
        (folder / "config.json").write_text(text, encoding="utf-8")
        for name in _TOKENIZER_FILES:
            if (origin / name).is_file():
                shutil.copyfile(origin / name, folder / name)

    _write_once(Path(target), write)


def _read_config(source: str) -> dict[str, Any]:
    try:
        content, _ = transformers.PretrainedConfig.get_config_dict(source)
    except Exception:  # the same kinds as in `config.read`
        content = {}
    if not content:
        raise MissingError(
            f"{source}: has no config.json that can be read",
            hint="the folder of a checkpoint, or the id of a model on the Hub",
        )
    return dict(content)


def _write_once(target: Path, write: Callable[[Path], None]) -> None:
    """Let a folder be written beside the target, and give it the name when it is whole."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UsageError(f"{target}: exists already", hint="another folder, or remove it first")
    if not target.parent.is_dir():
        raise UsageError(f"{target.parent}: is no folder", hint="make it first")
    part = target.parent / f".{target.name}.part"
    shutil.rmtree(part, ignore_errors=True)  # what a killed run left
    part.mkdir()
    try:
        write(part)
        open_to_umask(part)
        part.rename(target)
    finally:
        shutil.rmtree(part, ignore_errors=True)
