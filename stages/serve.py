r"""Serve a reward model over HTTP: for RL trainers, and for those who run no vLLM.

Answers at /score (records, as `polarctl score` reads them), /classify and /pooling (the shapes of
vLLM, SGLang and lmdeploy) and /get_reward (OpenRLHF), with raw rewards; /tokenize counts;
/v1/models, /health and /metrics say how it is. Requests that arrive together are computed together.

It listens on this machine alone. On another --host every route but /health asks for a key
(`Authorization: Bearer ...`), which comes from POLARCTL_SERVER_KEY or --key-file. SIGTERM, its
normal end, lets it finish what it has begun and can finish within 2.5 s; the rest is answered with
503.

\b
polarctl serve -m runs/rm --port 8000
polarctl score candidates.jsonl -m runs/rm --server http://127.0.0.1:8000 -o scores.jsonl
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import typer

from polarctl.config import KEY_VARIABLE, Bare, Device, Dtype
from polarctl.scoring.options import PromptStyle


@dataclass(frozen=True, kw_only=True)
class Config(Bare):
    """Options of `polarctl serve`."""

    model: Annotated[str, typer.Option("--model", "-m", help="Reward model: a folder or a Hub id.")]
    served_model_name: Annotated[
        str | None, typer.Option(help="Its name in replies; default: --model.")
    ] = None
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1"
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000
    end_token: Annotated[
        tuple[str, ...],
        typer.Option(
            metavar="TEXT",
            help="/get_reward: what the policy ends its texts with, as `<|im_end|>`; repeatable.",
        ),
    ] = ()
    strip_thinking: Annotated[
        bool,
        typer.Option(
            "--strip-thinking", help="/score, /get_reward: score without <think>...</think>."
        ),
    ] = False
    reward_floor: Annotated[
        str,
        typer.Option(
            metavar="VALUE",
            help="/score, /get_reward: raw reward of an output without an answer: empty, in an "
            "unfinished thought, `finish_reason: length`, or without the --end-token. A number, "
            "none, or auto: -20 with --strip-thinking, else none.",
        ),
    ] = "auto"
    key_file: Annotated[
        str | None, typer.Option(metavar="PATH", help="File whose first line is the key.")
    ] = None
    prompt_style: PromptStyle = "auto"
    pooling_data: Annotated[
        Literal["list", "nested", "number"],
        typer.Option(
            help="/pooling: how a reward is written: a list `[r]` as in vLLM, or for the published "
            "POLAR client nested `[[r]]` (its vllm mode) or a number `r` (its lmdeploy mode)."
        ),
    ] = "list"
    max_body_mib: Annotated[int, typer.Option(min=1, help="Size of a request at most.")] = 32
    max_inputs: Annotated[
        int,
        typer.Option(
            min=1,
            help="Rewards of a request at most; a candidate counts for each of its references.",
        ),
    ] = 4096
    max_text_chars: Annotated[
        int,
        typer.Option(
            min=1, help="Characters of one text at most (to tokenize one takes up to 350 bytes)."
        ),
    ] = 262_144
    max_chars: Annotated[
        int,
        typer.Option(
            min=1,
            help="Characters of a request at most, each input with its prompt and reference.",
        ),
    ] = 33_554_432
    max_connections: Annotated[
        int, typer.Option(min=1, help="Open connections at most; more are answered with 503.")
    ] = 1024
    request_timeout: Annotated[
        float,
        typer.Option(
            min=0.1,
            help="Seconds in which a request must have arrived (its headers: 10 at most), and its "
            "reply be taken.",
        ),
    ] = 60.0
    batch_tokens: Annotated[int, typer.Option(min=1, help="Tokens of one forward pass.")] = 8192
    device: Device = "auto"
    dtype: Dtype = "auto"


def run(config: Config) -> None:
    """Serve until a signal comes."""
    from polarctl.errors import need
    from polarctl.scoring.answers import REWARD_FLOOR, Answers, floor_of

    default = REWARD_FLOOR if config.strip_thinking else None
    answers = Answers(
        strip_thinking=config.strip_thinking, floor=floor_of(config.reward_floor, default)
    )
    key = _key(config)
    _check_host(config.host, key)

    from polarctl.scoring import engines

    try:
        from polarctl.serving import app, listening
        from polarctl.serving.limits import Limits
    except ImportError:
        raise need("fastapi, uvicorn, prometheus-client", "serve") from None
    from polarctl.storage import manifest

    with listening.bound(config.host, config.port) as (listener, address):
        limits = Limits(
            body_bytes=config.max_body_mib << 20,
            inputs=config.max_inputs,
            text_chars=config.max_text_chars,
            chars=config.max_chars,
        )
        scorer = engines.open_here(
            config.model,
            chat=engines.is_chat(config.model, config.prompt_style),
            device=config.device,
            dtype=config.dtype,
            batch_tokens=config.batch_tokens,
        )
        name = config.served_model_name or config.model
        identity = manifest.folder_identity(config.model)
        service = app.Service(
            scorer, name, limits, config.end_token, identity, answers, config.pooling_data
        )
        greeting = f"serving {config.model} on {address}"
        listening.serve(
            service,
            key,
            listener,
            greeting,
            connections=config.max_connections,
            arrives_s=config.request_timeout,
        )


def _key(config: Config) -> str | None:
    """The key that clients must send, if any."""
    import os
    from pathlib import Path

    from polarctl.errors import UsageError

    if config.key_file is None:
        text, source = os.environ.get(KEY_VARIABLE), KEY_VARIABLE
    else:
        source = config.key_file
        try:
            text = (Path(config.key_file).read_text(encoding="utf-8").splitlines() or [""])[0]
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"{config.key_file}: cannot be read: {error}") from None
    if text is None:
        return None
    key = text.strip()
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise UsageError(f"{source}: holds no key: ASCII without spaces")
    return key


def _check_host(host: str, key: str | None) -> None:
    """Raise UsageError for an address that others reach, without a key."""
    import ipaddress

    from polarctl.errors import UsageError

    try:
        local = ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = host == "localhost"
    if not local and key is None:
        raise UsageError(
            f"`--host {host}` can be reached from elsewhere and needs a key",
            hint=f"{KEY_VARIABLE}=... or --key-file PATH",
        )
