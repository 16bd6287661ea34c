"""The whole stack as a user starts it (`python -m server up`), on free ports in a temporary directory, once per test session."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import psutil
import psycopg
import pytest

from tests.tiny_models import build_tiny_causal_model

ROOT = Path(__file__).resolve().parents[2]
API_PREFIX = "/api/v1/model-training"
MAX_TRAINING_JOBS = 2
START_SECONDS = 180.0
STOP_SECONDS = 60.0
# Short leases: a killed worker's job is taken up again within the test's patience.
VARIABLES = {"MAX_TRAINING_JOBS": str(MAX_TRAINING_JOBS), "LEASE_SECONDS": "6", "HEARTBEAT_SECONDS": "0.3", "TORCH_THREADS": "1"}
# Away from the defaults, so that a test can tell that they count.
DEFAULTS = {"DEFAULT_BATCH_SIZE": "5", "DEFAULT_LEARNING_RATE": "0.002"}


class Stack:
    """A running stack: where to call it, and what lies and runs below it."""

    def __init__(self, directory: Path, variables: Mapping[str, str]) -> None:
        http_port, grpc_port = find_free_ports(2)
        self.url = f"http://127.0.0.1:{http_port}"
        self.api = self.url + API_PREFIX
        self.grpc_target = f"127.0.0.1:{grpc_port}"
        self.data_directory = directory / "data"
        self.storage_path, self.cache_path = directory / "models-kept", directory / "models-cached"
        self.log_path = directory / "up.log"
        self.imports_path = directory / "imports"
        self.imports_path.mkdir()
        paths = {"MODEL_STORAGE_PATH": str(self.storage_path), "MODEL_CACHE_PATH": str(self.cache_path)}
        paths["DATASET_IMPORT_ROOTS"] = str(self.imports_path)
        ports = {"DATA_DIRECTORY": str(self.data_directory), "HTTP_PORT": str(http_port), "GRPC_PORT": str(grpc_port)}
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "server", "up"],
                cwd=ROOT,
                env={**os.environ, **VARIABLES, **DEFAULTS, **paths, **ports, **variables},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def wait_ready(self) -> None:
        """Wait until REST answers through all parts."""
        self.wait_until(self._answers, START_SECONDS)

    def _answers(self) -> bool:
        try:
            return httpx.get(f"{self.api}/models", timeout=5).is_success
        except httpx.HTTPError:
            return False

    def stop(self) -> None:
        """Stop as Ctrl-C does, and demand that nothing is left."""
        processes = self.list_processes()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        try:
            assert self.process.wait(STOP_SECONDS) == 0, self.read_log()
        finally:
            self.process.kill()
        assert [p for p in processes if is_alive(p)] == []

    def read_log(self) -> str:
        """Give the end of what `up` and its roles printed."""
        return self.log_path.read_text("utf-8", "replace")[-6000:]

    def list_processes(self) -> list[psutil.Process]:
        """Give `up` and everything below it."""
        if self.process.poll() is not None:
            return []
        own = psutil.Process(self.process.pid)
        return [own, *own.children(recursive=True)]

    def find_role(self, role: str) -> psutil.Process | None:
        """Find the process of a role (api, worker, engine), or the child of a job (train, index): the first there is."""
        for process in self.list_processes():
            try:
                command = process.cmdline()
            except psutil.NoSuchProcess:
                continue
            if command[1:4] == ["-m", "server", role]:
                return process
        return None

    def wait_for_role(self, role: str) -> psutil.Process:
        """Wait until such a process runs."""
        self.wait_until(lambda: self.find_role(role) is not None)
        process = self.find_role(role)
        assert process is not None
        return process

    @property
    def database_url(self) -> str:
        """The embedded PostgreSQL, for looking at what no call tells."""
        return f"postgresql://postgres@/postgres?host={self.data_directory}/run/postgres"

    def query(self, statement: str, *values: object) -> list[tuple[Any, ...]]:
        """Run one statement in the embedded PostgreSQL."""
        with psycopg.connect(self.database_url, autocommit=True) as connection:
            return connection.execute(statement.encode(), values).fetchall()

    def make_tiny_model(self, family: str = "llama") -> str:
        """Lay a tiny base model where local models may be named; give its path, which is its id."""
        directory = self.data_directory / "models" / f"tiny-{family}"
        if not directory.exists():
            build_tiny_causal_model(directory, family)
        return str(directory)

    def make_unsafe_model(self, name: str) -> str:
        """Lay a model with a file that must never be loaded: pickled weights alone, or code of its own that its config asks for."""
        directory = self.data_directory / "models" / f"unsafe-{name}"
        if not directory.exists():
            build_tiny_causal_model(directory)
            if name.endswith(".py"):
                (directory / name).write_text("raise SystemExit('this must never run')\n")
                config = (directory / "config.json").read_text("utf-8")
                mapping = f'{{"auto_map": {{"AutoModelForCausalLM": "{Path(name).stem}.Evil"}},'
                (directory / "config.json").write_text(config.replace("{", mapping, 1), "utf-8")
            else:
                for weights in directory.glob("*.safetensors"):
                    weights.unlink()
                (directory / name).write_bytes(b"\x80\x04.")
        return str(directory)

    def wait_until(self, condition: Callable[[], bool], seconds: float = 120.0) -> None:
        """Poll until the condition holds."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, f"the stack ended:\n{self.read_log()}"
            assert time.monotonic() < deadline, f"it did not happen in {seconds:g} s; the stack said:\n{self.read_log()}"
            time.sleep(0.05)


def find_free_ports(count: int) -> list[int]:
    """Find different ports that nobody listens on."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [int(opened.getsockname()[1]) for opened in sockets]
    for opened in sockets:
        opened.close()
    return ports


def is_alive(process: psutil.Process) -> bool:
    """Tell whether it still runs; a zombie does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.fixture(scope="session")
def stack() -> Iterator[Stack]:
    """The stack that all end-to-end tests share. Each test leaves no running job behind."""
    with tempfile.TemporaryDirectory(prefix="stack-") as directory:
        running = Stack(Path(directory), {})
        try:
            running.wait_ready()
            yield running
        finally:
            running.stop()
