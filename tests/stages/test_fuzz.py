"""Random and damaged input for every stage: a documented status, one line with its place, no more.

No traceback, no reward that is none, no row that vanishes, and memory that stays within bounds.
`make test-faults` tries ten thousand; a case that fails is run again alone with what is printed.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import fuzzing
import pytest
from faults import SEED, count, report

ROOT = Path(__file__).parents[2]
# Cases without and with the full counts.
RECORDS = {
    "validate": (60, 2500),
    "convert": (60, 3000),
    "tables": (60, 1000),
    "pair": (40, 1500),
    "eval": (40, 1500),
    "compare": (40, 500),
    "rate": (40, 500),
    "show": (40, 500),
}
MODELS = {
    "score": (15, 600),
    "sample": (10, 300),
    "pretrain": (10, 200),
    "finetune": (10, 200),
    "rft": (10, 200),
}


def fuzzed(stage, number, model=""):
    """Run cases in a process of their own: (faults, statuses, MiB that its memory grew by)."""
    words = [stage, str(SEED), "0", str(number), *([str(model)] if model else [])]
    result = subprocess.run(
        [sys.executable, fuzzing.__file__, *words],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, (result.returncode, result.stderr[-3000:])
    *faults, totals = map(json.loads, result.stdout.splitlines())
    for fault in faults:
        print(f"again: python tests/fuzzing.py {stage} {SEED} {fault['case']} 1 {model}", fault)
    return faults, totals["statuses"], totals["grown_mib"]


def check(stage, number, model=""):
    faults, statuses, grown = fuzzed(stage, number, model)
    tracebacks = sum(fault["why"] == "a traceback" for fault in faults)
    report(f"fuzzed {stage}", inputs=number, tracebacks=tracebacks, **{"other faults": len(faults)})
    assert not faults
    assert sum(statuses.values()) == number
    assert statuses["0"] > number // 20 and statuses["3"] > number // 20  # both were met
    assert grown < 256


@pytest.mark.parametrize("stage", RECORDS)
def test_bad_input_of_records_is_one_line(stage):
    check(stage, count(*RECORDS[stage]))


@pytest.mark.slow
@pytest.mark.parametrize("stage", MODELS)
def test_bad_input_of_a_stage_with_a_model_is_one_line(stage, tiny_lm, tiny_rm):
    model = tiny_rm if stage in ("score", "finetune") else tiny_lm
    check(stage, count(*MODELS[stage]), model)


def test_a_case_depends_on_its_number_alone():
    first = [fuzzing.make("convert", 3, number)[0] for number in range(30)]
    assert [fuzzing.make("convert", 3, number)[0] for number in reversed(range(30))] == first[::-1]
    assert len(set(first)) > 25
