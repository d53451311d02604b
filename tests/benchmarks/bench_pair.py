"""`pair` over many trajectories: time and peak memory, beside the same join in other engines.

python tests/benchmarks/bench_pair.py --prompts 25000        (1,000,000 trajectories, about 1 GB)
python tests/benchmarks/bench_pair.py --prompts 25000 --rollouts     (500,000, --from-rollouts)

The join alone is what an engine would do for `pair`: all trajectories of a prompt together, prompts
in the order in which they first appear. The engines read the JSON themselves and check nothing.
`pip install polars duckdb daft` for them; one that is not installed is named and left out.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import orjson

POLICIES, SAMPLES = 8, 5
STEPS, STEP_SAMPLES = 5, 4
COLUMNS = {name: "varchar" for name in ("id", "prompt", "output", "policy")} | {"sample": "int"}

POLARS = """
import sys, polars as pl
frame = (
    pl.scan_ndjson(sys.argv[1]).with_row_index("row").group_by("id")
    .agg(pl.col("row").min(), pl.col("prompt").first(), "policy", "sample", "output").sort("row")
    .collect(engine="streaming")
)
print(frame["policy"].list.len().sum())
"""

DUCKDB = f"""
import sys, duckdb
store = duckdb.connect(sys.argv[2] + "/duck.db", config=dict(
    memory_limit="256MB", threads=1, temp_directory=sys.argv[2] + "/duck",
    preserve_insertion_order=False))
store.execute(
    "create table t as select row_number() over () as row, * from "
    "read_ndjson('" + sys.argv[1] + "', columns={COLUMNS})")
store.execute("create table f as select id, min(row) as first from t group by id")
store.execute("select first, t.* from t join f using (id) order by first, row")
total = 0
while rows := store.fetchmany(8192):
    total += len(rows)
print(total)
"""

DAFT = """
import sys, daft
from daft import col
frame = daft.read_json(sys.argv[1]).groupby("id").agg(
    col("prompt").any_value(), *(col(name).list_agg() for name in ("policy", "sample", "output")))
print(sum(len(one) for part in frame.iter_partitions() for one in part.to_pydict()["policy"]))
"""

OWN = """
import sys
from polarctl import cli
command = ["pair", sys.argv[1], "-o", sys.argv[2] + "/triples.jsonl", "--force", "-q"]
sys.exit(cli.run(command + sys.argv[3:]))
"""


def vocabulary(rng: random.Random) -> list[str]:
    """5,000 words of 7 letters."""
    return ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=7)) for _ in range(5000)]


def generate(path: Path, prompts: int) -> None:
    """Write trajectories of about 900 bytes, policy after policy, as `sample` does."""
    rng = random.Random(0)
    words = vocabulary(rng)
    asked = [f"{number} " + " ".join(rng.choices(words, k=30)) for number in range(prompts)]
    with open(path, "wb") as stream:
        for policy in range(POLICIES):
            for number, prompt in enumerate(asked):
                for sample in range(SAMPLES):
                    fields = {
                        "id": f"p{number:08}",
                        "prompt": prompt,
                        "output": " ".join(rng.choices(words, k=70)),
                        "policy": f"policy-{policy}",
                        "sample": sample,
                    }
                    stream.write(orjson.dumps(fields) + b"\n")


def generate_rollouts(path: Path, prompts: int) -> None:
    """Write rollouts of about 800 bytes, step after step, as `rft` does: a third are right."""
    rng = random.Random(0)
    words = vocabulary(rng)
    asked = [f"{number} " + " ".join(rng.choices(words, k=30)) for number in range(prompts)]
    with open(path, "wb") as stream:
        for step in range(STEPS):
            for number, prompt in enumerate(asked):
                for sample in range(STEP_SAMPLES):
                    fields = {
                        "id": f"p{number:08}",
                        "prompt": prompt,
                        "reference": f"The answer is {number}.",
                        "output": " ".join(rng.choices(words, k=50)),
                        "policy": "start",
                        "sample": sample,
                        "step": step,
                        "reward": rng.gauss(0, 1),
                        "check": float(rng.random() < 1 / 3),
                    }
                    stream.write(orjson.dumps(fields) + b"\n")


def measure(name: str, code: str, path: Path, scratch: str, *options: str) -> None:
    """Print a row: one process's wall time, processor time and peak memory."""
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(path), scratch, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    took = time.perf_counter() - start
    if process.returncode:
        print(f"{name:>8}  failed: {process.stderr.read()[-200:]!r}")
        return
    busy = used.ru_utime + used.ru_stime
    print(f"{name:>8}{took:10.1f}{busy:10.1f}{used.ru_maxrss / 1024:10.0f}", flush=True)


def main() -> None:
    """Print a table."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--prompts", type=int, default=25_000)
    options.add_argument("--only-own", action="store_true", help="leave the other engines out")
    options.add_argument("--rollouts", action="store_true", help="rollouts, for --from-rollouts")
    given = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trajectories.jsonl"
        if given.rollouts:
            generate_rollouts(path, given.prompts)
            count = given.prompts * STEPS * STEP_SAMPLES
        else:
            generate(path, given.prompts)
            count = given.prompts * POLICIES * SAMPLES
        print(f"{count:,} records, {path.stat().st_size / 2**20:,.0f} MiB, {os.cpu_count()} cores")
        print(f"{'':>8}{'wall, s':>10}{'CPU, s':>10}{'MiB':>10}", flush=True)
        if given.rollouts:
            measure("pair", OWN, path, folder, "--from-rollouts")
            return
        measure("pair", OWN, path, folder)
        engines = {"duckdb": DUCKDB, "polars": POLARS, "daft": DAFT}
        for name, code in {} if given.only_own else engines.items():
            if importlib.util.find_spec(name) is None:
                print(f"{name:>8}  is not installed")
            else:
                measure(name, code, path, folder)


if __name__ == "__main__":
    main()
