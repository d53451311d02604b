"""Verifiers that run programs: a command of the user's, and math-verify in its processes."""

import json
import shlex
import sys
import time

import pytest

from polarctl.errors import MissingError, PolarctlError, RecordError
from polarctl.records import Record
from polarctl.verifiers.bounds import Bounds
from polarctl.verifiers.named import open_verifier


def program(tmp_path, text):
    path = tmp_path / "program.py"
    path.write_text(text)
    return f"command:{shlex.join([sys.executable, '-S', str(path)])}"


def run(name, outputs, record=None, **limits):
    verifier = open_verifier(name, limits=Bounds(**limits))
    try:
        records = [Record(record or {"prompt": "p", "answer": "a"}, "f.jsonl:7")] * len(outputs)
        return verifier.values(records, outputs)
    finally:
        verifier.close()


def test_a_command_reads_the_record_and_prints_a_number(tmp_path):
    name = program(
        tmp_path,
        "import json, sys\n"
        "r = json.load(sys.stdin)\n"
        "print(json.dumps({'a': 1, 'half': 0.5, 'other': None}[r['output']] if r['mine'] else 0))",
    )
    outputs = ["a", "half", "other"] * 3
    assert run(name, outputs, {"mine": [1]}) == [1.0, 0.5, None] * 3


def test_a_command_need_not_read(tmp_path):
    big = {"text": "x" * 1_000_000}
    assert run(program(tmp_path, "print(1)"), ["a"], big) == [1.0]


def test_a_command_may_say_much_on_stderr(tmp_path):
    name = program(
        tmp_path, "import sys\nfor i in range(200_000): print('chatter', file=sys.stderr)\nprint(1)"
    )
    assert run(name, ["a"]) == [1.0]


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("import sys; print('broken pipe', file=sys.stderr); sys.exit(3)", "ended with status 3"),
        ("raise ValueError('oh')", "ended with status 1"),
        ("import os; os.kill(os.getpid(), 11)", "was ended by SIGSEGV"),
        ("print('about right')", "printed `about right`, which is no number from 0 to 1"),
        ("print('score:'); print(1)", "printed `score: 1`, which is no number"),
        ("print(2)", "printed `2`, which is no number from 0 to 1"),
        ("print('NaN')", "printed `NaN`"),
        ("print('true')", "printed `true`"),
        ("pass", "printed ``"),
        ("while True: print('chatter' * 99)", "printed more than 4,096 bytes"),
        ("x = bytearray(2**30)", "ended with status 1"),  # with half of that allowed
    ],
)
def test_a_command_that_fails_is_an_error_that_names_the_record(text, what, tmp_path):
    with pytest.raises(PolarctlError) as error:
        run(program(tmp_path, text), ["a"], memory_gib=0.5)
    assert str(error.value).startswith("f.jsonl:7: `command:") and what in str(error.value)
    assert error.value.exit_status == 1
    if "oh" in text:
        assert "ValueError: oh" in error.value.hint
    if "bytearray" in text:
        assert "MemoryError" in error.value.hint


def test_a_slow_command_is_ended_with_all_that_it_started(tmp_path):
    alive = tmp_path / "alive"
    child = f"import time; time.sleep(2); open({str(alive)!r}, 'w')"
    name = program(
        tmp_path,
        f"import subprocess, sys, time\nsubprocess.Popen([sys.executable, '-c', {child!r}])\n"
        "time.sleep(60)",
    )
    begin = time.monotonic()
    with pytest.raises(PolarctlError, match="took more than 1 s"):
        run(name, ["a"], timeout_s=1)
    assert time.monotonic() - begin < 30
    time.sleep(2.5)
    assert not alive.exists()


def test_a_command_that_leaves_a_process_behind_is_not_waited_for(tmp_path):
    name = program(
        tmp_path,
        "import subprocess, sys\nsubprocess.Popen(['sleep', '60'])\nprint(1)",
    )
    begin = time.monotonic()
    assert run(name, ["a"], timeout_s=50) == [1.0]
    assert time.monotonic() - begin < 40


# -- math -----------------------------------------------------------------------------------------

RIGHT = [
    ("1/2", "0.5"),
    ("$\\frac{1}{2}$", "so it is $\\frac{2}{4}$"),
    ("\\frac{1}{2}", "\\boxed{\\frac12}"),  # bare LaTeX in the record
    ("\\boxed{x^2-1}", "$(x-1)(x+1)$"),
    ("72", "Altogether 72 clips."),
    (["3", "$\\pi$"], "the area is $\\pi$"),
    (12, "12"),
]
WRONG = [("1/2", "1/3"), ("72", "none"), ("$\\{1,2\\}$", "$\\{1,3\\}$"), ("$x$", "$y$")]


def test_math_agrees_with_math_verify():
    import math_verify

    verifier = open_verifier("math")
    try:
        records = [Record({"answer": truth}) for truth, _ in RIGHT + WRONG]
        outputs = [output for _, output in RIGHT + WRONG]
        ours = verifier.values(records, outputs)
        assert verifier.values([Record({"x": 1})], ["1"]) == [None]
        assert all(map(verifier.applies, records)) and not verifier.applies(Record({"x": 1}))
        with pytest.raises(RecordError, match="f:3: field `answer`: `math` finds no mathematical"):
            verifier.applies(Record({"answer": "who knows"}, "f:3"))
    finally:
        verifier.close()
    assert ours == [1.0] * len(RIGHT) + [0.0] * len(WRONG)
    for value, record, output in zip(ours, records, outputs, strict=True):
        if isinstance(record["answer"], str) and record["answer"] != "\\frac{1}{2}":
            theirs = math_verify.verify(
                math_verify.parse(record["answer"]), math_verify.parse(output)
            )
            assert value == float(theirs), record


def test_math_that_takes_too_long_is_wrong_and_counted(capsys):
    verifier = open_verifier("math", limits=Bounds(timeout_s=2))
    towers = ["$9^{9^{9^9}}$", "$2$"] * 2
    try:
        assert verifier.values([Record({"answer": "$2$"})] * 4, towers) == [0.0, 1.0] * 2
        assert verifier.late == 2
    finally:
        verifier.close()
    assert "2 answers were not shown to be right within 2 s" in capsys.readouterr().err


def test_without_its_package_a_verifier_names_the_extra(monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingError, match="math-verify") as error:
        open_verifier("math")
    assert error.value.hint == "pip install 'polarctl[math]'"
    monkeypatch.setitem(sys.modules, "jsonschema", None)
    with pytest.raises(MissingError, match="jsonschema") as error:
        open_verifier("json-schema:@s")
    assert error.value.hint == "pip install 'polarctl[json]'"


def test_a_verifier_needs_no_torch():
    import subprocess

    text = (
        "import sys; from polarctl.verifiers.named import open_verifier\n"
        "v = open_verifier('gsm8k'); print(v.values([{'answer': '7'}], ['7']))\n"
        "print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["[1.0]", "False", "False"], json.dumps(done.stderr)
