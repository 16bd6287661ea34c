"""A real vLLM server over one model, in the environment that `make test-vllm` makes."""

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from tests.e2e.stack import find_free_ports

# Set by `make test-vllm`: the Python that vLLM is installed for. Without it nothing of this runs.
VLLM_PYTHON = os.environ.get("VLLM_PYTHON")
START_SECONDS = 300.0
VARIABLES = {
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


@contextmanager
def start_vllm_server(model: Path, name: str, log: Path, *arguments: str) -> Iterator[str]:
    """Serve a model under a name, with adapters; give the server's URL. Kills it, and what it started, at the end."""
    assert VLLM_PYTHON is not None
    [port] = find_free_ports(1)
    command = [VLLM_PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--served-model-name", name]
    command += ["--host", "127.0.0.1", "--port", str(port), "--enable-lora", "--max-lora-rank", "16", *arguments]
    with log.open("wb") as written:
        process = subprocess.Popen(command, env={**os.environ, **VARIABLES}, stdout=written, stderr=written, start_new_session=True)
    try:
        url, end = f"http://127.0.0.1:{port}", time.monotonic() + START_SECONDS
        while not _is_healthy(url):
            is_hopeful = process.poll() is None and time.monotonic() < end
            assert is_hopeful, log.read_text("utf-8", "replace")[-4000:]
            time.sleep(0.5)
        yield url
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _is_healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=5).is_success
    except httpx.HTTPError:
        return False
