"""Starts `up` as a process of its own and looks at what it says and what runs below it."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil

_ROOT = Path(__file__).resolve().parents[2]
_PATIENCE_SECONDS = 60.0


class RunningUp:
    """One `up` on a data directory."""

    def __init__(self, data_directory: Path, http_port: int, grpc_port: int, database_url: str = "") -> None:
        self.data_directory = data_directory
        self.lines: list[str] = []
        environment = {"DATA_DIRECTORY": str(data_directory), "HTTP_PORT": str(http_port), "GRPC_PORT": str(grpc_port)}
        environment["DATABASE_URL"] = database_url
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.launcher.up_program"],
            cwd=_ROOT, env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))

    def wait_for_line(self, part: str, count: int = 1) -> None:
        """Wait until `count` lines contain `part`."""
        wait_until(lambda: sum(part in line for line in self.lines) >= count, lambda: f"no {part!r} in:\n" + "\n".join(self.lines))

    def wait_ready(self) -> "RunningUp":
        """Wait until all parts are ready."""
        self.wait_for_line("Ctrl-C stops everything.")
        return self

    def list_processes(self) -> list[psutil.Process]:
        """Give `up` and all processes below it."""
        own = psutil.Process(self.process.pid)
        return [own, *own.children(recursive=True)]

    def find(self, *words: str) -> psutil.Process:
        """Give the topmost process below `up` whose command line has all `words`."""
        return next(p for p in self.list_processes()[1:] if all(any(word in part for part in p.cmdline()) for word in words))

    def end(self, number: signal.Signals = signal.SIGINT) -> int:
        """Send a signal; give the exit code once it has ended and all was read."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        code = self.process.wait(_PATIENCE_SECONDS)
        self._reader.join(_PATIENCE_SECONDS)
        return code


def wait_until(condition: Callable[[], bool], explain: Callable[[], str] = lambda: "it did not happen") -> None:
    """Poll until the condition holds."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, explain()
        time.sleep(0.05)


def list_alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Keep those that still run; a zombie does not."""
    return [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def find_free_ports(count: int) -> list[int]:
    """Find different ports that nobody listens on."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [int(s.getsockname()[1]) for s in sockets]
    for opened in sockets:
        opened.close()
    return ports
