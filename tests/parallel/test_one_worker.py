"""A process that works when it is called: its errors, its death, its end."""

import operator
import os
import signal

import pytest

from polarctl.errors import PolarctlError
from polarctl.parallel.pool import OneWorker


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_it_works_in_a_process_of_its_own_until_it_is_closed():
    worker = OneWorker(eval, environment={"ABOUT": "x"}, task="computes")
    assert worker("6 * 7") == 42
    with pytest.raises(ZeroDivisionError) as caught:
        worker("1 / 0")
    assert "Traceback" in str(caught.value.__cause__)  # of the process
    assert worker("__import__('os').environ['ABOUT']") == "x"
    pid = worker("__import__('os').getpid()")
    assert pid != os.getpid() and alive(pid)
    worker.close()
    worker.close()
    assert not alive(pid)


def test_its_death_is_said_and_not_waited_for():
    worker = OneWorker(
        operator.methodcaller("format"), environment={}, task="writes texts", hint="more memory"
    )
    assert worker("a") == "a"
    (process,) = [one.process for one in worker._workers.all]
    os.kill(process.pid, signal.SIGKILL)
    with pytest.raises(PolarctlError, match="a process that writes texts was killed by SIGKILL"):
        worker("b")
    assert process.poll() == -signal.SIGKILL
