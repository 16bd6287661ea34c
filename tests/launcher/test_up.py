"""`up` from outside: what it says, what it refuses, and that nothing of it stays, however it ends."""

import os
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import psycopg
import pytest

from server.launcher.leash import leash_command
from tests.launcher.running_up import RunningUp, find_free_ports, list_alive, wait_until


class _Place:
    """A data directory in which stacks are started; the test's end ends them."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.started: list[RunningUp] = []

    def start(self, ports: list[int] | None = None, database_url: str = "") -> RunningUp:
        http_port, grpc_port = ports or find_free_ports(2)
        self.started.append(RunningUp(self.directory, http_port, grpc_port, database_url))
        return self.started[-1]

    def prepare(self, name: str) -> None:
        (self.directory / "roles").mkdir(parents=True, exist_ok=True)
        (self.directory / "roles" / name).touch()


@pytest.fixture
def place() -> Iterator[_Place]:
    # Only its owner may enter, as below /root: PostgreSQL must run there all the same.
    with tempfile.TemporaryDirectory() as directory:
        held = _Place(Path(directory) / "data")
        yield held
        for up in held.started:
            up.end(signal.SIGKILL)
        wait_until(lambda: not [p for p in psutil.process_iter(["cmdline"]) if directory in " ".join(p.info["cmdline"] or ())])


def _connect(place: _Place) -> "psycopg.Connection[tuple[object, ...]]":
    return psycopg.connect((place.directory / "roles" / "migrate.database_url").read_text(), autocommit=True)


def test_each_part_is_reported_in_order_and_stopped_in_reverse(place: _Place) -> None:
    up = place.start().wait_ready()
    processes = up.list_processes()
    assert [line for line in up.lines if line.endswith(" is ready")] == [
        f"{name} is ready" for name in ("PostgreSQL", "engine", "worker", "api", "Envoy")
    ]
    assert any(line.startswith("REST  http://127.0.0.1:") for line in up.lines)
    assert up.end(signal.SIGINT) == 0
    assert list_alive(processes) == []
    assert (place.directory / "roles" / "stopped").read_text().split() == ["api", "worker", "engine"]
    assert up.lines[-1] == "PostgreSQL is stopped"
    assert "database system is shut down" in (place.directory / "logs" / "postgres.log").read_text()


def test_with_database_url_the_outside_server_is_used_and_none_started(place: _Place, empty_database_url: str) -> None:
    up = place.start(database_url=empty_database_url).wait_ready()
    assert "PostgreSQL is ready" not in up.lines
    assert not (place.directory / "postgres").exists()
    for role in ("migrate", "worker", "api"):
        assert (place.directory / "roles" / f"{role}.database_url").read_text() == empty_database_url
    assert up.end(signal.SIGINT) == 0


def test_a_second_up_on_the_same_data_directory_is_refused_and_names_the_first(place: _Place) -> None:
    first = place.start().wait_ready()
    second = place.start()
    assert second.process.wait(60) == 1
    second.end()
    assert second.lines == [f"Another `up` (process {first.process.pid}) runs on {place.directory}. Stop it, or set DATA_DIRECTORY."]
    assert len(list_alive(first.list_processes())) > 5


def test_every_port_in_use_is_named(place: _Place) -> None:
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as other:
        ports = [one.getsockname()[1], other.getsockname()[1]]
        up = place.start(ports)
        assert up.process.wait(60) == 1
        up.end()
    assert up.lines == [
        f"{name}: port {port} on 127.0.0.1 cannot be used: address already in use."
        for name, port in zip(("HTTP_PORT", "GRPC_PORT"), ports, strict=True)
    ]
    assert not (place.directory / "postgres").exists()


def test_kill_minus_nine_of_up_leaves_no_process_and_the_next_start_finds_the_data(place: _Place) -> None:
    up = place.start().wait_ready()
    with _connect(place) as connection:
        connection.execute("CREATE TABLE kept AS SELECT 42 AS answer")
        buffers = connection.execute("SELECT setting::bigint * 8192 FROM pg_settings WHERE name = 'shared_buffers'").fetchone()
    assert buffers is not None
    assert buffers[0] == pytest.approx(min(psutil.virtual_memory().total / 10, 8 << 30), rel=0.01)
    processes = up.list_processes()
    up.end(signal.SIGKILL)
    wait_until(lambda: list_alive(processes) == [], lambda: f"still there: {list_alive(processes)}")
    # In order even so: no recovery at the next start.
    assert "database system is shut down" in (place.directory / "logs" / "postgres.log").read_text()
    place.start().wait_ready()
    with _connect(place) as connection:
        assert connection.execute("SELECT answer FROM kept").fetchone() == (42,)


def test_up_starts_again_while_the_killed_ones_postgres_still_shuts_down(place: _Place) -> None:
    place.start().wait_ready().end(signal.SIGKILL)
    assert place.start().wait_ready().end() == 0


def test_postgres_recovers_when_all_its_processes_were_killed(place: _Place) -> None:
    up = place.start().wait_ready()
    with _connect(place) as connection:
        connection.execute("CREATE TABLE kept AS SELECT 42 AS answer")
    postmaster = up.find("postgres", "-D")
    for process in [*postmaster.children(recursive=True), postmaster]:
        with suppress(psutil.NoSuchProcess):  # the first one's death makes the postmaster end the others
            process.kill()
    up.wait_for_line("PostgreSQL is ready again")
    with _connect(place) as connection:
        assert connection.execute("SELECT answer FROM kept").fetchone() == (42,)


def test_a_pid_file_that_names_a_foreign_process_does_not_stop_postgres(place: _Place) -> None:
    place.start().wait_ready().end()
    data = place.directory / "postgres"
    # As after a restart of the machine: the number belongs to another process of the same account now.
    user = data.owner() if data.stat().st_uid != os.geteuid() else None
    foreign = subprocess.Popen(leash_command(["/bin/sleep", "1000"], signal.SIGKILL, user))
    try:
        (data / "postmaster.pid").write_text(f"{foreign.pid}\n{data}\n1\n5432\n\n\n1 1\nready\n")
        assert place.start().wait_ready().end() == 0
        assert foreign.poll() is None
    finally:
        foreign.kill()
        foreign.wait()


def test_a_role_that_dies_is_started_again_with_growing_pauses(place: _Place) -> None:
    up = place.start().wait_ready()
    for times in (1, 2):
        role = up.find("role_program", "engine")
        children = role.children()
        role.kill()
        up.wait_for_line("engine is ready again", times)
        assert list_alive(children) == []
    ends = [line for line in up.lines if line.startswith("engine ended")]
    assert ends == [f"engine ended (killed by SIGKILL); it is started again in {pause} s" for pause in (1, 2)]


def test_a_role_that_cannot_start_ends_the_whole_start(place: _Place) -> None:
    place.prepare("api.fails")
    up = place.start()
    assert up.process.wait(60) == 1
    up.end()
    assert "api did not start: exit code 4." in up.lines


def test_a_failed_migration_ends_the_whole_start(place: _Place) -> None:
    place.prepare("migrate.fails")
    up = place.start()
    assert up.process.wait(60) == 1
    up.end()
    assert "The database's tables could not be brought up to date." in up.lines
    assert not any("engine" in line for line in up.lines)


def test_a_signal_during_the_start_stops_what_runs_already(place: _Place) -> None:
    up = place.start()
    up.wait_for_line("PostgreSQL is ready")
    processes = up.list_processes()
    assert up.end(signal.SIGTERM) == 0
    assert list_alive(processes) == []
    assert "Ctrl-C stops everything." not in up.lines
