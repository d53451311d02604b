"""Tokenizing in other processes: the same results in the same order, and no process left behind."""

import os
import pickle
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from tiny import build_tokenizer

from polarctl.errors import PolarctlError, RecordError
from polarctl.model.template import Encoder
from polarctl.records import Record
from polarctl.training.data import Group, TripleEncoder, default_workers, encoded


def records(count, start=0):
    return [Record({"n": n}, f"a.jsonl:{n + 1}") for n in range(start, count)]


@dataclass
class Square:
    """What the workers do here; a number may be bad, fatal or slow."""

    bad: int = -1
    error: str = "record"
    seconds: float = 0.0

    def __call__(self, record):
        if record["n"] == self.bad:
            if self.error == "record":
                raise RecordError("is bad", where=record.where, hint="mend it")
            if self.error == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.error == "exit":
                raise SystemExit(3)
            raise Unpicklable(1, 2)
        time.sleep(self.seconds)
        return record["n"] ** 2, os.getpid()


class Unpicklable(Exception):
    """Cannot be made again from its `args`, as exceptions of many libraries."""

    def __init__(self, first, second):
        super().__init__(f"{first} and {second}")


def squares(items):
    return [square for square, _ in items]


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def gone(pids, within_s=10.0):
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        if not any(map(is_running, pids)):
            return True
        time.sleep(0.02)
    return False


linux = pytest.mark.skipif(not Path("/proc/self").exists(), reason="looks into /proc")


# -- order and errors -----------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("count", [0, 1, 8, 61])
def test_results_are_those_of_one_process_in_its_order(workers, count):
    found = squares(encoded(iter(records(count)), Square(), workers=workers, ahead=20))
    assert found == [n**2 for n in range(count)]


def test_work_is_done_in_other_processes_and_by_all_of_them():
    found = list(encoded(iter(records(64)), Square(seconds=0.01), workers=2, ahead=32))
    pids = {pid for _, pid in found}
    assert len(pids) == 2 and os.getpid() not in pids


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_comes_at_its_records_turn_with_its_place_and_hint(workers):
    found = []
    with pytest.raises(RecordError) as caught:
        for item in encoded(iter(records(60)), Square(bad=29), workers=workers, ahead=40):
            found.append(item)
    assert squares(found) == [n**2 for n in range(29)]
    assert str(caught.value) == "a.jsonl:30: is bad"
    assert (caught.value.where, caught.value.hint) == ("a.jsonl:30", "mend it")


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_of_the_input_comes_after_everything_before_it(workers):
    def input_with_a_bad_row():
        yield from records(21)
        raise RecordError("no JSON", where="a.jsonl:22")

    found = []
    with pytest.raises(RecordError, match="a.jsonl:22: no JSON"):
        for item in encoded(input_with_a_bad_row(), Square(), workers=workers, ahead=40):
            found.append(item)
    assert squares(found) == [n**2 for n in range(21)]


def test_an_error_that_cannot_travel_is_told_in_words():
    with pytest.raises(RuntimeError, match="Unpicklable: 1 and 2") as caught:
        list(encoded(iter(records(9)), Square(bad=3, error="other"), workers=1, ahead=8))
    assert "in __call__" in str(caught.value.__cause__)  # the worker's traceback


def test_a_function_that_workers_cannot_load_is_an_error_and_no_endless_wait():
    class Local:
        pass

    with pytest.raises((AttributeError, pickle.PicklingError), match="Local"):
        list(encoded(iter(records(9)), Local(), workers=1, ahead=8))


@pytest.mark.parametrize(
    ("error", "told"), [("killed", "was killed by SIGKILL"), ("exit", r"ended \(3\)")]
)
def test_a_worker_that_dies_is_an_error_and_no_endless_wait(error, told):
    with pytest.raises(PolarctlError, match=f"a process that tokenizes {told}") as caught:
        list(encoded(iter(records(60)), Square(bad=20, error=error), workers=2, ahead=32))
    assert "--workers" in caught.value.hint


# -- look-ahead -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("ahead", "most"), [(32, 32), (30, 32), (1, 16)])
def test_no_more_records_are_read_than_are_asked_for_ahead(ahead, most):
    taken = 0

    def counted():
        nonlocal taken
        for record in records(10_000):
            taken += 1
            yield record

    items = encoded(counted(), Square(), workers=2, ahead=ahead)
    next(items)
    assert taken == most  # whole messages of 8, one for each of the two workers at least
    for _ in range(15):
        next(items)
    assert taken == most + 8  # the second message was opened, and one more sent
    items.close()


# -- ends -----------------------------------------------------------------------------------------


@linux
def test_closing_ends_the_processes_in_the_middle_of_their_work():
    items = encoded(iter(records(10_000)), Square(seconds=0.05), workers=2, ahead=400)
    pids = {pid for _, pid in (next(items) for _ in range(16))}
    start = time.monotonic()
    items.close()
    assert not any(map(is_running, pids))
    assert time.monotonic() - start < 5  # 400 under way would take 10 s


def parent(tmp_path, what):
    """A process with two workers that has told their ids, and the ids."""
    program = f"""
        import signal, sys, time
        # A shell lets its background jobs ignore Ctrl-C, and these tests with them.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        sys.path.insert(0, {str(Path(__file__).parent.parent)!r})
        from test_encode import Square, encoded, records
        items = encoded(iter(records(100_000)), Square(seconds=0.02), workers=2, ahead=400)
        print(*{{pid for _, pid in (next(items) for _ in range(16))}}, flush=True)
        {what}
    """
    script = tmp_path / "main"  # as a console script, without a suffix; and without a main guard
    script.write_text(textwrap.dedent(program))
    process = subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    return process, [int(pid) for pid in process.stdout.readline().split()]


@linux
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_workers_end_with_their_parent_however_it_ends(tmp_path, number):
    process, pids = parent(tmp_path, "for item in items: pass")
    assert len(pids) == 2
    process.send_signal(number)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == -number
    assert gone(pids)
    assert "workers.py" not in errors or number == signal.SIGINT, errors  # no word of the workers'


@linux
def test_a_signal_to_all_processes_is_the_parents_to_handle(tmp_path):
    """As a scheduler sends it: the parent goes on to the end of its step, and needs its workers."""
    process, pids = parent(tmp_path, "print(sum(1 for _ in zip(range(40), items)))")
    for pid in pids:
        assert os.getsid(pid) == pid  # what the terminal sends does not reach it at all
        os.kill(pid, signal.SIGTERM)
        os.kill(pid, signal.SIGINT)
    out, errors = process.communicate(timeout=20)
    assert (out, errors, process.returncode) == ("40\n", "", 0)
    assert gone(pids)


# -- triples --------------------------------------------------------------------------------------


def encoder(**options):
    return Encoder(
        build_tokenizer(),
        separator="<|user|>",
        reward_token="<|end|>",
        **{"max_length": 64, "max_response_length": 16, **options},
    )


TRIPLE = {
    "prompt": "What is the sum?",
    "reference": "It is 7.",
    "chosen": "The sum is 7.",
    "rejected": "It is Paris.",
    "negatives": ["It is 42.", "Do not panic!"],
    "margin": 0.5,
}


@pytest.mark.parametrize(
    ("negatives", "outputs"),
    [
        (1, ["The sum is 7.", "It is Paris."]),
        (2, ["The sum is 7.", "It is Paris.", "It is 42."]),
        (9, ["The sum is 7.", "It is Paris.", "It is 42.", "Do not panic!"]),
    ],
)
def test_a_triple_becomes_its_candidates_ids_the_chosen_first(negatives, outputs):
    used = encoder()
    group = TripleEncoder(used, negatives)(Record(TRIPLE, "a:1"))
    alone = [used.encode(TRIPLE["prompt"], TRIPLE["reference"], output) for output in outputs]
    assert group == Group(tuple(alone), 0.5, ())  # nothing is cut, so each is as if alone


def test_a_record_without_margin_and_negatives_has_none():
    plain = {key: TRIPLE[key] for key in ("prompt", "reference", "chosen", "rejected")}
    group = TripleEncoder(encoder(), 4)(Record({**plain, "wrapper": "pretrain"}))
    assert len(group.ids) == 2 and group.margin == 0.0
    assert group.ids != TripleEncoder(encoder(), 4)(Record(plain)).ids  # the wrapper's newline


def test_cut_pieces_are_named_and_the_prompt_is_cut_for_all_alike():
    long = {**TRIPLE, "prompt": "The sea was calm that day. " * 9, "chosen": "It helps. " * 20}
    used = encoder()
    group = TripleEncoder(used, 1)(Record(long))
    assert group.cut == ("output", "prompt")
    first, second = used.encode_pair(
        long["prompt"], long["reference"], long["chosen"], long["rejected"]
    )
    assert group.ids == (first, second)


def test_a_text_that_cannot_be_encoded_is_told_with_its_place():
    broken = {**TRIPLE, "wrapper": "chat"}
    with pytest.raises(RecordError, match="a.jsonl:4: wrapper must be one of") as caught:
        TripleEncoder(encoder())(Record(broken, "a.jsonl:4"))
    assert caught.value.where == "a.jsonl:4"


def test_triples_are_encoded_alike_in_a_worker():
    rows = [Record({**TRIPLE, "chosen": f"The sum is {n}."}, f"a:{n}") for n in range(20)]
    work = TripleEncoder(encoder(), 2)
    rows[13]["prompt"] = [{"role": "user", "content": "Why not?"}]
    found = list(encoded(iter(rows), work, workers=1, ahead=16))
    assert found == [work(row) for row in rows]


@pytest.mark.parametrize("processes", [1, 2, 10_000])
def test_the_default_count_leaves_a_core_to_each_training_process(processes):
    assert default_workers("cpu", processes) == 0
    count = default_workers("cuda", processes)
    cores = os.cpu_count()
    assert 0 <= count <= 8 and processes * (count + 1) <= max(cores, processes)
