"""An engine over one tiny model in a process of its own, for tests that kill it.

Started by `python -m tests.inference.engine_process SOCKET NAME=MODEL …`.
"""

import asyncio
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from server.inference.server import serve
from tests.inference.engines import make_engine


async def main(socket_path: Path, models: dict[str, Path]) -> None:
    """Serve until SIGTERM; say "ready" on stdout."""
    torch.set_num_threads(1)
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    engine = make_engine(models, socket_path.parent)
    await serve(engine, socket_path, stop=stop, on_ready=lambda: print("ready", flush=True))


@contextmanager
def start_engine_process(socket_path: Path, model: Path, **more: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """Run an engine whose base model "llama" is `model`; versions lie beside the socket. Kills it at the end."""
    models = [f"{name}={directory}" for name, directory in {"llama": model, **more}.items()]
    command = [sys.executable, "-m", "tests.inference.engine_process", str(socket_path), *models]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        yield process
    finally:
        process.kill()
        process.wait()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), {name: Path(path) for name, _, path in (entry.partition("=") for entry in sys.argv[2:])}))
