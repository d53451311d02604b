"""Deliberate faults in the code that keeps data: each has to be caught by the test that is named.

    python tests/mutations.py [NUMBER ...]

copies the tree, puts one fault into the copy, runs the tests there, and prints a table. Exit
status 1: a fault was not caught, or its place in the code is gone. Part of `make test-faults`.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
LIMIT_S = 900


class Fault(NamedTuple):
    """A fault: what it is, where, the code as it is and with the fault, and who catches it."""

    what: str
    file: str
    right: str
    wrong: str
    test: str


FAULTS = [
    Fault(
        "a file is renamed into place without fsync",
        "polarctl/storage/atomic.py",
        "        stream.flush()\n        os.fsync(stream.fileno())\n    os.replace",
        "        stream.flush()\n    os.replace",
        "tests/storage/test_power_cut.py::test_the_same_command_goes_on_after_a_cut_at_any_moment",
    ),
    Fault(
        "a resume appends to a torn tail in place of cutting it off",
        "polarctl/storage/growing_file.py",
        "        self.stream.truncate(size)\n",
        "        pass\n",
        "tests/storage/test_write.py::test_garbage_at_the_end_is_cut_off",
    ),
    Fault(
        "a resume with other options is accepted",
        "polarctl/storage/fingerprint.py",
        "        if before.get(key) != now.get(key):",
        "        if False:",
        "tests/storage/test_write.py::test_a_resume_with_other_options_is_refused_and_touches_nothing",
    ),
    Fault(
        "a resume with another input of the same size is accepted",
        "polarctl/storage/read.py",
        "        if passed == done and digest is not None and digest != now:",
        "        if False:",
        "tests/storage/test_write.py::test_a_resume_with_another_input_is_refused",
    ),
    Fault(
        "the journal tells of a unit before its bytes are written",
        "polarctl/storage/write.py",
        "        for track in tracks:\n            track.flush()\n        if self._journal",
        "        if self._journal",
        "tests/storage/test_write.py::test_a_file_cut_at_any_byte_resumes_to_the_same_bytes",
    ),
    Fault(
        "the journal tells of a unit before its bytes are synced",
        "polarctl/storage/growing_file.py",
        "        self.stream.flush()\n        os.fsync(self.stream.fileno())\n",
        "        self.stream.flush()\n",
        "tests/storage/test_power_cut.py::test_the_same_command_goes_on_after_a_cut_at_any_moment",
    ),
    Fault(
        "a run that begins again does so in the place of the old file",
        "polarctl/storage/growing_file.py",
        "        if not size and not self.hidden:",
        "        if False:",
        "tests/storage/test_power_cut.py"
        "::test_a_second_cut_while_the_first_is_made_good_is_none_the_worse",
    ),
    Fault(
        "the lock on an output is released at once",
        "polarctl/storage/claim.py",
        "        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)\n",
        "        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)\n"
        "        fcntl.flock(stream, fcntl.LOCK_UN)\n",
        "tests/storage/test_write.py::test_a_second_writer_is_refused_at_once",
    ),
    Fault(
        "the hashes of a checkpoint's files are not compared",
        "polarctl/storage/checkpoint.py",
        '        return mark if files == mark["files"] else None',
        "        return mark",
        "tests/storage/test_damaged_folders.py::test_a_checkpoint_with_any_file_damaged_is_none",
    ),
    Fault(
        "a checkpoint is marked before its files are synced",
        "polarctl/storage/checkpoint.py",
        "    atomic.sync_files(target)\n",
        "",
        "tests/storage/test_power_cut.py::test_a_checkpoint_that_is_marked_is_whole",
    ),
    Fault(
        "a complete output is believed by its size",
        "polarctl/storage/fingerprint.py",
        '    if record["outputs"][output.name].get("sha256") != manifest.sha256(output):',
        "    if False:",
        "tests/cli/test_replace.py::test_complete_is_believed_of_the_same_bytes_alone",
    ),
    Fault(
        "a boolean is taken as a reward",
        "polarctl/scoring/server.py",
        "    if type(value) not in (int, float):",
        "    if not isinstance(value, (int, float)):",
        "tests/scoring/test_replies.py::test_what_is_no_reward_is_a_fault",
    ),
    Fault(
        "rewards are taken in the order of the reply, not of `index`",
        "polarctl/scoring/server.py",
        '        rows = sorted(rows, key=lambda row: row["index"])\n',
        "",
        "tests/scoring/test_replies.py::test_the_index_says_which_reward_is_whose",
    ),
    Fault(
        "a reply that is no reward counts as a reward of 0",
        "polarctl/scoring/server.py",
        '        raise Fault("a reward that is no number")',
        "        return 0.0",
        "tests/scoring/test_replies.py::test_what_is_no_reward_is_a_fault",
    ),
    Fault(
        "the time for the whole of a reply is ignored",
        "polarctl/parallel/http_client.py",
        "await asyncio.wait_for(sent, self.timeout_s)",
        "await asyncio.wait_for(sent, 60)",
        "tests/parallel/test_raw_replies.py::test_what_is_no_reply_ends_within_the_time_with_one_line",
    ),
    Fault(
        "requests are sent again without end",
        "polarctl/parallel/http_client.py",
        "            if now + pause > max(first, self._good) + self.deadline_s:",
        "            if now + pause > max(first, self._good) + self.deadline_s + 60:",
        "tests/parallel/test_raw_replies.py::test_what_is_no_reply_ends_within_the_time_with_one_line",
    ),
]


def copy(target):
    """The files that git knows of, or would; `stages` and `schemas` are found inside the copy."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    for folder in ("stages", "schemas"):
        (target / "polarctl" / folder).symlink_to(target / folder)


def tested(tree, test, most=1):
    """pytest's exit status for a test in a tree, and its last words."""
    environment = {**os.environ, "PYTHONPATH": f"{tree}{os.pathsep}{tree / 'tests'}"}
    command = [sys.executable, "-m", "pytest", "-q", f"--maxfail={most}", "-p", "no:cacheprovider"]
    try:
        done = subprocess.run(
            [*command, test],
            cwd=tree,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
        )
    except subprocess.TimeoutExpired:
        return 1, f"no end in {LIMIT_S} s"
    return done.returncode, (done.stdout.strip() or done.stderr).splitlines()[-1]


def main(numbers):
    chosen = [FAULTS[number] for number in numbers] if numbers else FAULTS
    missed = 0
    with tempfile.TemporaryDirectory() as top:
        tree = Path(top) / "tree"
        tree.mkdir()
        copy(tree)
        for test in sorted({fault.test for fault in chosen}):
            status, last = tested(tree, test)
            if status:
                print(f"{test}: fails without a fault: {last}", flush=True)
                return 1
        print("| fault | file | caught by | s |\n|---|---|---|---|")
        for fault in chosen:
            path, start = tree / fault.file, time.monotonic()
            whole = path.read_text()
            assert whole.count(fault.right) == 1, f"{fault.file} has changed: {fault.what}"
            path.write_text(whole.replace(fault.right, fault.wrong))
            status, last = tested(tree, fault.test)
            path.write_text(whole)
            # 1: tests failed. Anything else is a command or a file that pytest cannot use.
            caught = f"`{fault.test}`" if status == 1 else f"NOTHING ({status}: {last})"
            missed += status != 1
            took = time.monotonic() - start
            print(f"| {fault.what} | `{fault.file}` | {caught} | {took:.0f} |", flush=True)
    print(f"{len(chosen) - missed} of {len(chosen)} faults were caught")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main([int(word) for word in sys.argv[1:]]))
