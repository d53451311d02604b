"""A stage in miniature: its processes do what a test tells them, through polarctl's command line.

python -m process_worker GPUS FOLDER RANK=TASK ...     (default task: wait to be stopped)
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

from polarctl import cli, console
from polarctl.errors import Interrupted, RecordError
from polarctl.parallel import launcher, stopping
from polarctl.parallel import rank as adopted

PATIENCE_S = 1.0


def work(task, place):
    rank = int(os.environ["RANK"])
    name, _, value = task.partition(":")
    if name == "wait":  # as the training loop does
        with stopping.StopFlag() as stop:
            (place / f"pid.{rank}").write_text(str(os.getpid()))
            while not stop.asked:
                time.sleep(0.01)
        raise Interrupted(f"stopped by SIGTERM after step {rank + 5}", hint="go on")
    if name == "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        (place / f"pid.{rank}").write_text(str(os.getpid()))
        time.sleep(60)
    elif name == "bad-record":
        raise RecordError("missing field `chosen`", where="t.jsonl:3")
    elif name == "status":
        sys.exit(int(value))
    elif name == "signal":
        os.kill(os.getpid(), int(value))
    elif name == "fault":
        raise ValueError("a fault of the program")
    elif name == "say":
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS")
        own = {name: os.environ[name] for name in names}
        (place / f"place.{rank}").write_text(json.dumps(own))
        sys.stdout.write(f"record of {rank}\n")  # at once, also where python is unbuffered
        sys.stdout.flush()
        console.note(f"note of {rank}")
        console.warn(f"warning of {rank}")
        (place / f"choices.{rank}").write_text(json.dumps(console.choices()))
        assert adopted.MARK not in os.environ
    elif name in ("reduce", "lose-partner"):
        reduce(place, lost=name == "lose-partner")


def reduce(place, lost):
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    total = torch.tensor(rank + 1.0)
    if lost and rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.all_reduce(total)
    (place / f"total.{rank}").write_text(str(total.item()))
    dist.destroy_process_group()


def dispatch(arguments):
    gpus, place, *told = arguments
    tasks = dict(task.split("=", 1) for task in told)
    nodes = int(os.environ.get("TEST_NODES", "1"))
    own = dict(gpus=int(gpus), nnodes=nodes, device="cpu", inputs=("t.jsonl",))
    if "RANK" not in os.environ:
        with cli._guarded_stdout():
            done = launcher.launch(
                "pretrain", **own, module="process_worker", patience_s=PATIENCE_S
            )
        assert done
        return
    assert not launcher.launch("pretrain", **own)
    work(tasks.get(os.environ["RANK"], "wait"), Path(place))


if __name__ == "__main__":
    cli._dispatch = dispatch
    cli.main()
