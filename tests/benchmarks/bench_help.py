"""Seconds until `--help` is printed: wall and CPU time, the least and the median of 11 runs.

python tests/benchmarks/bench_help.py
"""

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from polarctl.cli import STAGES

RUNS = 11
PROGRAM = str(Path(sys.executable).parent / "polarctl")


def measure(arguments: list[str]) -> tuple[float, float]:
    """Wall and CPU seconds of one run."""
    start, before = time.perf_counter(), os.times()
    subprocess.run([PROGRAM, *arguments], stdout=subprocess.DEVNULL, check=True)
    after = os.times()
    cpu = after.children_user + after.children_system
    return time.perf_counter() - start, cpu - before.children_user - before.children_system


def main() -> None:
    """Print a row per command."""
    print(f"{'command':24}{'wall min':>10}{'median':>10}{'CPU min':>10}")
    for arguments in [["--help"], *([stage, "--help"] for stage in STAGES)]:
        runs = [measure(arguments) for _ in range(RUNS)]
        wall, cpu = [run[0] for run in runs], [run[1] for run in runs]
        print(
            f"{' '.join(arguments):24}{min(wall):10.3f}{statistics.median(wall):10.3f}"
            f"{min(cpu):10.3f}"
        )


if __name__ == "__main__":
    main()
