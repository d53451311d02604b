"""vLLM's own server, on the CPU and a port of its own."""

import contextlib
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}


@contextlib.contextmanager
def vllm_server(model, name, *options):
    """The address of a server of a model, which it serves under a name."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # `vllm serve` asks for the version of the package `vllm`, which its CPU build is not.
    program = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    child = subprocess.Popen(
        [*program, *options, "--dtype", "float32", "--port", str(port), "--enforce-eager"]
        + ["--served-model-name", name],
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            assert child.poll() is None, child.stderr.read()[-3000:]
            try:
                urllib.request.urlopen(address + "/health", timeout=2)
                break
            except (urllib.error.URLError, OSError):
                time.sleep(1)
        yield address
    finally:
        child.terminate()
        child.wait(60)
