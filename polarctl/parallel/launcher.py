"""Several processes as one: `--gpus N` and `--nnodes M` start the same command again, N times here.

The processes get torchrun's variables (RANK, WORLD_SIZE, MASTER_ADDR, ...), so that either may
start a run; the command of torchrun that does the same is said. Where no GPUs are counted, the
process that waits for the others loads no library.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import socket
import stat
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from polarctl import console
from polarctl.errors import MissingError, UsageError
from polarctl.parallel import rank
from polarctl.parallel.children import Child, Signals, wait

# Once one process has ended the others cannot save: a save waits for all of them.
PATIENCE_S = 10.0

# The running command, which `polarctl.cli` knows: its arguments and the real stdout.
command_line: list[str] | None = None
stdout = 1


@dataclass(frozen=True)
class Node:
    """A machine of a run.

    Attributes:
        number: Its place among them, from 0.
        address: The first machine's.
        port: Where the processes meet there.
    """

    number: int
    address: str
    port: str


def launch(
    stage: str,
    *,
    gpus: int,
    nnodes: int,
    device: str,
    inputs: Sequence[str] = (),
    module: str = "polarctl",
    arguments: Sequence[str] | None = None,
    patience_s: float = PATIENCE_S,
) -> bool:
    """Run the whole command again in several processes, and wait for them.

    SIGTERM and Ctrl-C make them finish their step, save and end, however long that takes. A second
    signal kills them.

    Args:
        stage: Name of the stage.
        gpus: Processes on this machine.
        nnodes: Machines; NODE_RANK (or SLURM_NODEID), MASTER_ADDR and MASTER_PORT say the rest.
        device: `--device`.
        inputs: The input paths.
        module: What `python -m` runs.
        arguments: The command line; default: the running command's.
        patience_s: Seconds for the others to end once one has failed, before they are killed.

    Returns:
        False when this process is to do the work: it is one of several already, or the only one.
        True when the others have done it.

    Raises:
        UsageError: An input that cannot be shared, a device for one, or a node without a number.
        MissingError: Fewer GPUs than processes.
        Interrupted: The processes were stopped by SIGTERM or Ctrl-C.
        ProcessFailed: One failed; the first one's message and exit status.
    """
    if rank.is_one_of_several():
        if rank.threads_chosen:  # said here too, for the manifest
            _say_threads(os.environ["OMP_NUM_THREADS"], rank.count_here())
        running = os.environ.get("WORLD_SIZE")
        if running is not None and gpus * nnodes not in (1, int(running)):
            raise UsageError(
                f"`--gpus {gpus} --nnodes {nnodes}`, and the launcher has started {running} "
                "processes",
                hint="leave them out: the launcher says how many",
            )
        return False
    if gpus == nnodes == 1:
        return False
    _check_inputs(inputs)
    node = _node_of(nnodes) if nnodes > 1 else None
    _check_device(device, gpus)
    if arguments is None:
        arguments = sys.argv[1:] if command_line is None else command_line
    environment = dict(os.environ)
    shown = torchrun(gpus, nnodes, node, module, arguments)
    threads_chosen = "OMP_NUM_THREADS" not in environment
    if threads_chosen:
        environment["OMP_NUM_THREADS"] = threads = str(max(1, _cores() // gpus))
        shown = f"OMP_NUM_THREADS={threads} {shown}"
    if not {"", os.getcwd()} & set(sys.path):
        # `python -m` would look for every module in the working folder first.
        environment.setdefault("PYTHONSAFEPATH", "1")
    console.note(f"{stage}: {gpus * nnodes} processes, as by: {shown}", command=shown)

    command = [sys.executable, "-m", module, *arguments]
    children: list[Child] = []
    with _meeting_place(node) as (address, port), Signals() as signals:
        try:
            for local in range(gpus):
                own = {
                    **environment,
                    **_place(local, gpus, nnodes, node),
                    "MASTER_ADDR": address,
                    "MASTER_PORT": port,
                }
                out = stdout if own["RANK"] == "0" else 2
                children.append(Child(command, own, stdout=out, threads_chosen=threads_chosen))
            wait(children, signals, patience_s)
        finally:
            for child in children:
                child.close()
    return True


def torchrun(
    gpus: int, nnodes: int, node: Node | None, module: str, arguments: Sequence[str]
) -> str:
    """The command of torchrun that does the same, for a shell."""
    where = ["--standalone"]
    if node is not None:
        where = ["--nnodes", str(nnodes), "--node-rank", str(node.number)]
        where += ["--master-addr", node.address, "--master-port", node.port]
    return shlex.join(["torchrun", *where, "--nproc-per-node", str(gpus), "-m", module, *arguments])


def _check_inputs(inputs: Sequence[str]) -> None:
    for path in inputs:
        if path == "-" or (os.path.exists(path) and not _has_an_end(os.stat(path).st_mode)):
            raise UsageError(
                "several processes cannot read one pipe", hint="write the triples to a file"
            )


def _has_an_end(mode: int) -> bool:
    return stat.S_ISREG(mode) or stat.S_ISDIR(mode)


def _check_device(device: str, gpus: int) -> None:
    if device.startswith("cuda:") and gpus > 1:
        raise UsageError(
            f"`--device {device}` is one GPU, and `--gpus {gpus}` asks for more",
            hint="--device cuda; CUDA_VISIBLE_DEVICES says which ones",
        )
    if device not in ("auto", "cuda"):
        return
    import torch

    found = torch.cuda.device_count()
    if gpus > found:
        raise MissingError(
            f"`--gpus {gpus}`: {found} GPUs found",
            hint="--device cpu runs the processes on the CPU",
        )


def _node_of(nnodes: int) -> Node:
    """This machine's place, as the environment says it."""
    number = os.environ.get("NODE_RANK") or os.environ.get("SLURM_NODEID") or ""
    address = os.environ.get("MASTER_ADDR") or ""
    for name, value in (("NODE_RANK", number), ("MASTER_ADDR", address)):
        if not value:
            raise UsageError(
                f"`--nnodes {nnodes}`: {name} is not set",
                hint="NODE_RANK is this machine's number, from 0 on; MASTER_ADDR the first one's "
                "name",
            )
    if not number.isdecimal() or int(number) >= nnodes:
        raise UsageError(
            f"`--nnodes {nnodes}`: NODE_RANK is `{number}`", hint=f"a number from 0 to {nnodes - 1}"
        )
    return Node(int(number), address, os.environ.get("MASTER_PORT") or "29500")


def _cores() -> int:
    """Cores that this process may use."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _say_threads(threads: str, processes: int) -> None:
    console.choice("threads", threads, f"{_cores()} cores for {processes} processes")


def _place(local: int, gpus: int, nnodes: int, node: Node | None) -> dict[str, str]:
    """The variables that tell a process its place, named as torchrun names them."""
    number = 0 if node is None else node.number
    values = {
        "RANK": number * gpus + local,
        "LOCAL_RANK": local,
        "WORLD_SIZE": gpus * nnodes,
        "LOCAL_WORLD_SIZE": gpus,
        "GROUP_RANK": number,
    }
    return {name: str(value) for name, value in values.items()}


@contextlib.contextmanager
def _meeting_place(node: Node | None) -> Iterator[tuple[str, str]]:
    """Address and port at which the processes meet; on one machine a port that is free."""
    if node is not None:
        yield node.address, node.port
        return
    with socket.socket() as held:
        # Bound and not listening: no other program gets the port, and the first one can bind it.
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        yield "127.0.0.1", str(held.getsockname()[1])
