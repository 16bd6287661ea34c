"""The child's side of a job: how it starts, speaks, stops and ends with its worker."""

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from server.childprocess import EXIT_CRASHED, EXIT_ORPHANED, explain_failure
from server.domain.events import Failed, Paused, Warned
from server.domain.jobs import FailureReason, JobFailure
from server.domain.orders import IndexOrder
from server.domain.specs import IndexSpec
from server.services.codec import CHILD_EVENT, ORDER

ROOT = Path(__file__).resolve().parents[1]
ORDER_LINE = ORDER.encode(IndexOrder("job_1", 1, IndexSpec("e"), "documents", 0)) + b"\n"

PROGRAM = """
import os, sys, threading, time
from server.childprocess import run_child
from server.domain.events import Paused, Warned
from server.domain.jobs import FailureReason, JobFailure

def work(order, emit, signals):
    emit(Warned("STARTED", order.job_id))
    {body}

sys.exit(run_child(work, int(sys.argv[1])))
"""
WAIT = "while not signals.should_stop(): time.sleep(0.01)\n    emit(Warned('STOPPED', ''))"
WAIT_FOR_PAUSE = (
    "while not signals.should_pause(): time.sleep(0.01)\n    emit(Warned('STOPPED', '') if signals.should_stop() else Paused())"
)
IGNORE = "time.sleep(1000)"


class _Child:
    def __init__(self, body: str) -> None:
        read_fd, write_fd = os.pipe()
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM.replace("{body}", body), str(write_fd)],
            cwd=ROOT, stdin=subprocess.PIPE, stderr=subprocess.PIPE, pass_fds=(write_fd,),
        )  # fmt: skip
        os.close(write_fd)
        self.events = os.fdopen(read_fd, "rb")

    def send(self, data: bytes) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(data)
        self.process.stdin.flush()


@pytest.fixture
def children() -> Iterator[list[_Child]]:
    started: list[_Child] = []
    yield started
    for child in started:
        child.process.kill()
        child.process.wait()
        for pipe in (child.process.stdin, child.process.stderr, child.events):
            assert pipe is not None
            pipe.close()


def _start(children: list[_Child], body: str, order: bytes = ORDER_LINE) -> _Child:
    children.append(_Child(body))
    children[-1].send(order)
    return children[-1]


def _read(child: _Child) -> object:
    return CHILD_EVENT.decode(child.events.readline())


def test_events_arrive_at_once_and_sigterm_asks_the_work_to_stop(children: list[_Child]) -> None:
    child = _start(children, WAIT)
    assert _read(child) == Warned("STARTED", "job_1")
    child.process.send_signal(signal.SIGTERM)
    assert _read(child) == Warned("STOPPED", "")
    assert child.process.wait(10) == 0


def test_sigusr1_asks_the_work_to_pause_and_not_to_stop(children: list[_Child]) -> None:
    child = _start(children, WAIT_FOR_PAUSE)
    _read(child)
    child.process.send_signal(signal.SIGUSR1)
    assert _read(child) == Paused()
    assert child.process.wait(10) == 0


def test_a_ctrl_c_in_the_terminal_is_left_to_the_worker(children: list[_Child]) -> None:
    child = _start(children, WAIT)
    _read(child)
    child.process.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        child.process.wait(0.5)


def test_the_child_ends_at_once_when_its_input_ends(children: list[_Child]) -> None:
    child = _start(children, IGNORE)
    _read(child)
    assert child.process.stdin is not None
    child.process.stdin.close()
    assert child.process.wait(10) == EXIT_ORPHANED


def test_a_child_without_an_order_ends(children: list[_Child]) -> None:
    child = _start(children, WAIT, b'{"half an or')
    assert child.process.stdin is not None
    child.process.stdin.close()
    assert child.process.wait(10) == EXIT_ORPHANED


def test_the_child_ends_when_nobody_reads_its_events(children: list[_Child]) -> None:
    child = _start(children, "time.sleep(1)\n    emit(Warned('x' * 1_000_000, ''))\n    time.sleep(1000)")
    _read(child)
    child.events.close()
    assert child.process.wait(10) == EXIT_ORPHANED


def test_the_child_of_a_killed_parent_is_killed_even_when_its_input_stays_open(tmp_path: Path) -> None:
    starter = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", sys.argv[1], "1"], stdin=0)
open(sys.argv[2], "w").write(str(child.pid))
time.sleep(1000)
"""
    # The pipe belongs to this process and outlives the parent: only the kernel's signal can end the child.
    parent = subprocess.Popen(
        [sys.executable, "-c", starter, PROGRAM.replace("{body}", IGNORE), str(tmp_path / "pid")],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert parent.stdin is not None
    assert parent.stdout is not None
    parent.stdin.write(ORDER_LINE)
    parent.stdin.flush()
    assert b"STARTED" in parent.stdout.readline()
    child = psutil.Process(int((tmp_path / "pid").read_text()))
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 10
    while child.is_running() and child.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    parent.stdin.close()
    parent.stdout.close()


def test_a_typed_failure_becomes_an_event_and_its_traceback_a_log(children: list[_Child]) -> None:
    child = _start(children, "raise JobFailure(FailureReason.DATASET_INVALID, 'No record.', 'Send some.')")
    _read(child)
    assert _read(child) == Failed(FailureReason.DATASET_INVALID, "No record.", "Send some.")
    assert child.process.wait(10) == 0
    assert child.process.stderr is not None
    assert b"Traceback" in child.process.stderr.read()


def test_an_unforeseen_failure_is_an_exit_code_and_a_log_only(children: list[_Child]) -> None:
    child = _start(children, "raise KeyError('where')")
    _read(child)
    assert child.events.read() == b""
    assert child.process.wait(10) == EXIT_CRASHED
    assert child.process.stderr is not None
    assert b"KeyError: 'where'" in child.process.stderr.read()


def test_events_of_several_threads_do_not_mix(children: list[_Child]) -> None:
    body = """threads = [threading.Thread(target=lambda: [emit(Warned("x" * 50_000, "")) for _ in range(20)]) for _ in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]"""
    child = _start(children, body)
    _read(child)
    events = [CHILD_EVENT.decode(line) for line in child.events]
    assert events == [Warned("x" * 50_000, "")] * 80


def _caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (MemoryError(), FailureReason.OUT_OF_MEMORY),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), FailureReason.OUT_OF_MEMORY),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory"), FailureReason.OUT_OF_MEMORY),
        (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"), FailureReason.OUT_OF_MEMORY),
        (OSError(errno.ENOSPC, "No space left on device"), FailureReason.DISK_FULL),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), FailureReason.DISK_FULL),
        (_caused(ValueError("saving failed"), OSError(errno.ENOSPC, "No space left on device")), FailureReason.DISK_FULL),
        (JobFailure(FailureReason.LOSS_NOT_FINITE, "NaN"), FailureReason.LOSS_NOT_FINITE),
    ],
    ids=str,
)
def test_failures_that_trying_again_does_not_cure_are_named(error: Exception, reason: FailureReason) -> None:
    failure = explain_failure(error)
    assert failure is not None
    assert failure.reason is reason


@pytest.mark.parametrize("error", [KeyError("x"), RuntimeError("shape mismatch"), OSError(errno.EIO, "Input/output error")], ids=str)
def test_other_failures_are_worth_another_try(error: Exception) -> None:
    assert explain_failure(error) is None


def test_the_peak_is_the_childs_own_and_not_that_of_who_started_it() -> None:
    held = b"\x01" * (300 << 20)
    program = "from server.childprocess import measure_peak_memory; print(measure_peak_memory())"
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert len(held) > int(said) > 5 << 20
