r"""Publish a checkpoint folder or a data file on the Hugging Face Hub, private by default.

Reads a folder written by `pretrain`, `finetune` or `rft`, or a .jsonl file (or a folder of them),
with its manifest. Only known files are uploaded, in one commit, after a check that they are whole
and hold no secrets; a README.md is written where there is none. Prints the commit's address.

The token comes from HF_TOKEN or `hf auth login`.

\b
polarctl push runs/rm my-name/my-reward-model --license apache-2.0
polarctl push triples.jsonl my-name/my-triples --parquet
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from polarctl.config import COMMON, Basic

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from polarctl.hub.bundle import Bundle

FEWEST_DRAWN = 10  # records, of which a plot says more than the table of their lengths


@dataclass(frozen=True, kw_only=True)
class Config(Basic):
    """Options of `polarctl push`."""

    path: Annotated[str, typer.Argument(metavar="PATH", help="Checkpoint folder or data file.")]
    repo_id: Annotated[
        str, typer.Argument(metavar="REPO_ID", help="`owner/name`, or a name of your own.")
    ]
    force: Annotated[
        bool,
        typer.Option(
            "--force", help="Publish an output without a manifest.", rich_help_panel=COMMON
        ),
    ] = False
    type: Annotated[
        Literal["model", "dataset"] | None,
        typer.Option(help="Kind of repository; default: told from PATH."),
    ] = None
    public: Annotated[bool, typer.Option("--public", help="Make a new repository public.")] = False
    revision: Annotated[
        str | None, typer.Option(metavar="BRANCH", help="Branch to commit to; default: main.")
    ] = None
    message: Annotated[str | None, typer.Option(help="Message of the commit.")] = None
    license: Annotated[
        str | None, typer.Option(metavar="ID", help="Licence named by the card: `apache-2.0`.")
    ] = None
    datasets: Annotated[
        tuple[str, ...],
        typer.Option(
            "--dataset",
            metavar="ID",
            help="Data set on the Hub named by a model's card; repeatable.",
        ),
    ] = ()
    parquet: Annotated[
        bool,
        typer.Option(
            "--parquet",
            help="Add the records as Parquet files, which the Hub's viewer and `load_dataset` "
            "read at once.",
        ),
    ] = False
    allow_secret: Annotated[
        tuple[str, ...],
        typer.Option(
            "--allow-secret",
            metavar="HASH",
            help="Publish what looks like a secret and is none, by its hash; repeatable.",
        ),
    ] = ()


def collect(config: Config, repo_type: str) -> Bundle:
    """The files to publish, checked, without card; touches no network."""
    from pathlib import Path

    from polarctl.hub import bundle

    take = bundle.collect_model if repo_type == "model" else bundle.collect_data
    return take(Path(config.path), force=config.force)


def add_parquet(found: Bundle, path: Path, folder: Path) -> list[dict[str, Any]]:
    """Add the records as Parquet files.

    Args:
        found: What is to be published.
        path: The data file, or the folder of them.
        folder: Where the Parquet files are written.

    Returns:
        What the card says of them (`dataset_info`).
    """
    from polarctl.hub import cards, shards

    where = path if path.is_dir() else path.parent
    infos = []
    for kind, parts in cards.splits(found.data).items():
        paths = {
            split: [str(where / file.name) for file in files] for split, files in parts.items()
        }
        made, info = shards.write_config(folder, kind, paths)
        infos.append(info)
        for split in made.values():
            for name, file in split.files.items():
                found.add(name, file)
    return infos


def add_plots(found: Bundle) -> None:
    """Add plots of the lengths of the texts, for files with enough of them."""
    from dataclasses import replace

    from polarctl.hub import card_plots

    for number, file in enumerate(found.data):
        texts = file.statistics
        if file.records < FEWEST_DRAWN or not texts.lengths:
            continue
        title = "Length of the texts"
        made = [("texts", title, card_plots.text_lengths(texts.lengths, title=title))]
        if texts.policy_lengths:
            rows, title = sorted(texts.policy_lengths.items()), "Length by policy"
            made.append(("policies", title, card_plots.policy_lengths(rows, title=title)))
        names = {}
        for what, title, drawing in made:
            name = f"plots/{file.name}.{what}.png"
            names[name] = title
            found.add(name, bytes(drawing))
        found.data[number] = replace(file, plots=names)


def card(
    config: Config, repo_id: str, found: Bundle, dataset_info: Sequence[dict[str, Any]] = ()
) -> str:
    """The README.md for a repository that has none."""
    from polarctl.hub import cards

    if found.data:
        return cards.dataset_card(
            repo_id, found.data, license=config.license, dataset_info=dataset_info
        )
    return cards.model_card(
        repo_id,
        found.config,
        found.manifest,
        found.metrics,
        license=config.license,
        datasets=config.datasets,
    )


def run(config: Config) -> None:
    """Check, then upload; or say what would be uploaded."""
    import tempfile
    from pathlib import Path

    # Next to nothing where there are no Parquet files.
    with tempfile.TemporaryDirectory(prefix="polarctl-push-") as folder:
        _push(config, Path(folder))


def _push(config: Config, folder: Path) -> None:
    import os
    import sys
    from pathlib import Path

    from polarctl import __version__, console
    from polarctl.errors import UsageError
    from polarctl.hub import bundle, upload
    from polarctl.hub.secrets import environment_secrets
    from polarctl.storage.write import stdout

    upload.check_repo_id(config.repo_id)
    repo_type, reason = bundle.tell_type(Path(config.path))
    if config.type is None:
        console.choice("type", repo_type, reason)
    repo_type = config.type or repo_type
    found = collect(config, repo_type)
    for flag, given, idle, why in (
        ("--license", config.license, "README.md" in found.items, "README.md is taken as it is"),
        ("--dataset", config.datasets, "README.md" in found.items, "README.md is taken as it is"),
        ("--dataset", config.datasets, repo_type == "dataset", "it is for a model's card"),
        ("--parquet", config.parquet, repo_type == "model", "it is for a data set"),
        ("--parquet", config.parquet, "README.md" in found.items, "README.md is taken as it is"),
    ):
        if given and idle:
            raise UsageError(f"`{flag}` has no effect here: {why}", hint="leave it out")
    for name, why in found.left_out.items():
        console.note(f"left out: {name} ({why})", left_out=name, reason=why)
    secrets = environment_secrets(os.environ)
    token = None
    if not config.dry_run:
        token = upload.find_token()
        secrets["your Hugging Face token"] = token.encode()
    bundle.refuse_secrets(found, secrets, config.allow_secret)
    bundle.warn_of_local_paths(found)

    infos = add_parquet(found, Path(config.path), folder) if config.parquet else []
    repo_id = upload.full_name(config.repo_id, token) if token else config.repo_id
    if "README.md" in found.items:
        console.choice("card", "README.md", "it is in the folder")
    else:
        add_plots(found)
        found.add("README.md", card(config, repo_id, found, infos).encode())
        console.choice("card", "generated", "there is no README.md")
    _say_plan(config, repo_id, repo_type, found)
    if token is None:
        return
    url = upload.publish(
        found.items,
        repo_id,
        repo_type=repo_type,
        token=token,
        message=config.message
        or f"Add {Path(config.path).resolve().name} (polarctl {__version__})",
        public=config.public,
        revision=config.revision,
        progress=sys.stderr.isatty() and not (config.quiet or config.json),
    )
    stdout().write(f"{url}\n".encode())


def _say_plan(config: Config, repo_id: str, repo_type: str, found: Bundle) -> None:
    from polarctl import console

    visibility = "public" if config.public else "private"
    total = sum(item.size for item in found.items.values())
    branch = f", branch {config.revision}" if config.revision else ""
    console.note(
        f"{repo_type} {repo_id} ({visibility} if new{branch}): "
        f"{len(found.items)} files, {total:,} bytes",
        repo=repo_id,
        type=repo_type,
        visibility=visibility,
        files={name: item.size for name, item in found.items.items()},
    )
    for name, item in found.items.items():
        console.note(f"  {name}: {item.size:,} bytes")
    readme = found.items["README.md"].source
    text = readme.decode() if isinstance(readme, bytes) else readme.read_text("utf-8", "replace")
    console.detail(text)
