"""Commands of the program in processes that start at once: forked from one that has the libraries.

A process that loads torch and TRL takes seconds to start. This one loads them and computes nothing;
each command runs in a fork of it, with memory, signals and files of its own.
"""

import os
import signal
import subprocess
import sys
import traceback
from pathlib import Path

ROOT = Path(__file__).parents[1]


class Forks:
    """Starts commands; a context manager.

    Args:
        libraries: What is loaded beforehand: `records` alone, `models` too, or `trainers` too.
    """

    def __init__(self, libraries="trainers"):
        self.libraries = libraries

    def __enter__(self):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        self.loader = subprocess.Popen(
            [sys.executable, __file__, self.libraries],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        return self

    def __exit__(self, *_):
        self.loader.stdin.close()
        assert self.loader.wait(timeout=60) == 0

    def start(self, arguments, errors, limit=0, first=""):
        """Start a command; its process id. `finish` has to be called before the next one.

        Args:
            arguments: The command line without the program's name.
            errors: Path of a file for stderr.
            limit: Largest size of a file that it may write, in bytes; 0: none.
            first: A line of Python that runs before the command.
        """
        words = [str(errors), str(limit), first, *map(str, arguments)]
        self.loader.stdin.write("\0".join(words) + "\n")
        self.loader.stdin.flush()
        return int(self.loader.stdout.readline())

    def finish(self):
        """Wait for the command; its exit status, negative for a signal."""
        return int(self.loader.stdout.readline())

    def run(self, arguments, errors, limit=0, first=""):
        self.start(arguments, errors, limit, first)
        return self.finish()


def command(words):
    import resource

    errors, limit, first, *arguments = words
    out = os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(out, 1)
    os.dup2(out, 2)
    if int(limit):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
    sys.argv = ["polarctl", *arguments]
    from polarctl import cli

    exec(first)
    cli.main()


def load_models():
    import torch
    import transformers  # noqa: F401
    from transformers import LlamaForCausalLM  # noqa: F401

    from polarctl.model import reward_model  # noqa: F401
    from polarctl.policies import writer  # noqa: F401

    torch.set_num_threads(1)


def load_trainers():
    import accelerate  # noqa: F401
    import datasets  # noqa: F401
    import peft  # noqa: F401
    import trl

    from polarctl.rl import trainer  # noqa: F401

    trl.GRPOTrainer, trl.RLOOTrainer, trl.SFTTrainer  # noqa: B018  (loaded when first named)


def main():
    from polarctl.stages import convert, eval, pair, sample, score  # noqa: F401

    if sys.argv[1] in ("models", "trainers"):
        load_models()
    if sys.argv[1] == "trainers":
        load_trainers()
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                command(line.rstrip("\n").split("\0"))
            except SystemExit as end:
                status = end.code or 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(status)
        print(child, flush=True)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
