"""What the studies share: a folder in which the real stages run by their command lines."""

from __future__ import annotations

import argparse
import resource
import shlex
import sys
from pathlib import Path
from typing import Any

from polarctl import cli
from polarctl.quickstart import policies
from polarctl.quickstart.policies import Zoo, rm_config
from polarctl.quickstart.steps import write


class Study:
    """One seed of a study, in one folder. The stages go on where they stopped."""

    def __init__(self, folder: Path, sizes: Any, seed: int):
        self.folder, self.sizes, self.seed = folder, sizes, seed

    def path(self, name: str) -> str:
        """A path inside the folder."""
        return str(self.folder / name)

    def polarctl(self, stage: str, *arguments: str, seed: int | None = None) -> None:
        """Print a command and run it in this process; end with its status when it fails."""
        words = [stage, *arguments]
        if stage != "score" and arguments[0] != "scaling":  # these need no random choice
            words += ["--seed", str(self.seed if seed is None else seed)]
        print(f"$ polarctl {shlex.join(words)}", file=sys.stderr, flush=True)
        status = cli.run([*words, "--quiet"])
        if status:
            sys.exit(status)

    def train_zoo(self, zoo: Zoo) -> list[str]:
        """Train policies of the quickstart's world; their names."""
        names = policies.train(zoo, self.folder / "zoo", processes=1)
        return [name for name in names if not name.startswith("mix-")]

    def write_config(self, tokenizer: Any, name: str, width: int = 96) -> None:
        """Write the config of a reward model of three layers, with its tokenizer.

        Args:
            tokenizer: That of the policies.
            name: Of a new folder.
            width: Hidden size; a multiple of 16.
        """
        config = rm_config(tokenizer)
        config.hidden_size, config.intermediate_size = width, 3 * width
        config.num_attention_heads = config.num_key_value_heads = width // config.head_dim
        config.save_pretrained(self.folder / name)
        tokenizer.save_pretrained(self.folder / name)

    def write_pool(self, names: list[str]) -> None:
        """Write pool.jsonl; the last of what is made before the stages run, it marks that."""
        pool = [{"policy": name, "model": self.path(f"zoo/{name}")} for name in names]
        write(self.folder / "pool.jsonl", pool)

    def is_made(self) -> bool:
        """Whether pool.jsonl is there."""
        (self.folder / "zoo").mkdir(parents=True, exist_ok=True)
        return (self.folder / "pool.jsonl").exists()


def parser_of(doc: str, output: str) -> argparse.ArgumentParser:
    """The options that all studies have.

    Args:
        doc: Docstring of the study.
        output: Its folder, if none is named.
    """
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, default=Path(output), metavar="DIR")
    parser.add_argument("--smallest", action="store_true", help="a size for tests: no figures")
    return parser


def say_cpu_minutes() -> None:
    """Say how much time of processors this process and its children have used."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    minutes = sum(one.ru_utime + one.ru_stime for one in used) / 60
    print(f"{minutes:.1f} CPU minutes", file=sys.stderr)
