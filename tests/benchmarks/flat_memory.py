"""Peak memory and speed of reading training data, by number of triples: memory must stay flat.

python tests/benchmarks/flat_memory.py 100000 3000000
"""

import itertools
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import orjson

from polarctl.records import Triple, check
from polarctl.training import data

TAKEN = 1000  # records that are read after passing over nine tenths of an epoch
WINDOW = 10_000


def generate(path: Path, count: int, answer_bytes: int) -> None:
    """Write triples with three different texts of a size each."""
    fill = "The sea was calm that day. " * (answer_bytes // 27 + 1)
    with open(path, "wb") as stream:
        for number in range(count):
            texts = {name: f"{name} {number} {fill}"[:answer_bytes] for name in ("a", "b", "c")}
            fields = {
                "prompt": f"Question {number}",
                "reference": texts["a"],
                "chosen": texts["b"],
                "rejected": texts["c"],
            }
            stream.write(orjson.dumps(fields) + b"\n")


def peak_mib() -> float:
    """Highest resident memory of this process so far, MiB (Linux counts KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(path: str, val_fraction: float) -> None:
    """Print a row: what survey and stream take in this process."""
    source = data.Source(
        paths=[path],
        verify=lambda record: check(record, Triple),
        val_fraction=val_fraction,
        window=WINDOW,
    )
    start = time.perf_counter()
    found = data.survey(source)
    surveyed = time.perf_counter() - start
    rows, mib = found.triples + found.held_out, found.bytes / 2**20
    after_survey = peak_mib()
    skip = found.triples * 9 // 10
    start = time.perf_counter()
    list(itertools.islice(data.stream(source, world=1, rank=0, skip=skip), TAKEN))
    passed = time.perf_counter() - start
    print(
        f"{rows:12,}{mib:10,.0f}{val_fraction:6.2f}{rows / surveyed:12,.0f}{mib / surveyed:8.0f}"
        f"{skip / passed:14,.0f}{after_survey:14.0f}{peak_mib():14.0f}",
        flush=True,
    )


def main(counts: list[int]) -> None:
    """Print a table; each row is measured in a process of its own."""
    print(
        f"{'triples':>12}{'MiB':>10}{'val':>6}{'survey/s':>12}{'MiB/s':>8}{'passed over/s':>14}"
        f"{'survey, MiB':>14}{'stream, MiB':>14}",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "triples.jsonl"
        for count, answer_bytes in [*((count, 150) for count in counts), (20_000, 6_700)]:
            generate(path, count, answer_bytes)
            for val_fraction in ("0", "0.01"):
                subprocess.run([sys.executable, __file__, str(path), val_fraction], check=True)


if __name__ == "__main__":
    if len(sys.argv) == 3 and Path(sys.argv[1]).exists():
        measure(sys.argv[1], float(sys.argv[2]))
    else:
        main([int(argument) for argument in sys.argv[1:]])
