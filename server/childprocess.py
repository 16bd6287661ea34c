"""The child's side of a job: reads its order, writes events to a pipe, stops or pauses when told and never outlives its worker.

Knows no database and no torch; the work itself is passed in.
"""

import ctypes
import errno
import faulthandler
import os
import resource
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from server.domain.errors import ServiceError
from server.domain.events import ChildEvent, Failed
from server.domain.jobs import OUT_OF_MEMORY_SUGGESTION, FailureReason, JobFailure
from server.domain.orders import Order
from server.services.codec import CHILD_EVENT, ORDER

Emit = Callable[[ChildEvent], None]


@dataclass(frozen=True, slots=True)
class Signals:
    """What the worker wants of the work, asked between two steps of it.

    `should_stop` (SIGTERM): end soon, save nothing. `should_pause` (SIGUSR1): save the state, emit CheckpointSaved and Paused, and end.
    """

    should_stop: Callable[[], bool]
    should_pause: Callable[[], bool]


Work = Callable[[Order, Emit, Signals], None]


def measure_peak_memory() -> int:
    """Give the bytes of memory that this process had at most.

    Not `ru_maxrss` where the kernel counts VmHWM: a child's begins at the peak of the process that started it.
    """
    with open("/proc/self/status") as status:
        lines = dict(line.split(":", 1) for line in status)
    kibibytes = int(lines["VmHWM"].split()[0]) if "VmHWM" in lines else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kibibytes << 10


EXIT_DONE = 0  # the work ended: with its result, with a Failed event, or because it was told to stop or to pause
EXIT_CRASHED = 1  # something unforeseen: the worker lets the job be tried again
EXIT_ORPHANED = 75  # the worker is gone

_STDIN = 0
_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
_READ_BYTES = 1 << 16
_MAX_ORDER_BYTES = 16 << 20
# How allocators say it; torch raises them as RuntimeError, on CPU and GPU alike. The last is how oneDNN says it.
_MEMORY_PHRASES = ("out of memory", "can't allocate memory", "Cannot allocate memory", "not enough memory", "could not create a primitive")
# The second is how safetensors says it, the third torch.save.
_DISK_PHRASES = ("No space left on device", "os error 28", "PytorchStreamWriter failed writing")


def run_child(work: Work, events_fd: int) -> int:
    """Do the work of the order on standard input; return the exit code. Events go to `events_fd`, everything printed is a log."""
    faulthandler.enable()
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        return EXIT_CRASHED
    stop, pause = threading.Event(), threading.Event()
    signal.signal(signal.SIGTERM, lambda _number, _frame: stop.set())
    # Before this line SIGUSR1 kills: a process that has not begun has nothing to save.
    signal.signal(signal.SIGUSR1, lambda _number, _frame: pause.set())
    # A Ctrl-C in a terminal is for the worker, which then says what happens to its children.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    line = _read_line()
    if line is None:
        return EXIT_ORPHANED
    threading.Thread(target=_exit_at_end_of_input, name="worker-watch", daemon=True).start()
    return _do_work(work, ORDER.decode(line), _EventWriter(events_fd), Signals(stop.is_set, pause.is_set))


def _do_work(work: Work, order: Order, emit: Emit, signals: Signals) -> int:
    try:
        work(order, emit, signals)
    except Exception as error:
        traceback.print_exc()
        failure = explain_failure(error)
        if failure is None:
            return EXIT_CRASHED
        emit(Failed(failure.reason, failure.message, failure.suggestion))
    return EXIT_DONE


def explain_failure(error: BaseException) -> JobFailure | None:
    """Give the typed failure that an exception (or one that caused it) stands for; None where trying again may help."""
    for cause in _causes(error):
        if isinstance(cause, JobFailure):
            return cause
        if _is_out_of_memory(cause):
            return JobFailure(
                FailureReason.OUT_OF_MEMORY,
                "The job needs more memory than this machine has.",
                OUT_OF_MEMORY_SUGGESTION,
            )
        if _is_disk_full(cause):
            return JobFailure(
                FailureReason.DISK_FULL,
                "The disk that holds models and checkpoints is full.",
                "Free space under MODEL_STORAGE_PATH and MODEL_CACHE_PATH, then start the job again.",
            )
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an exception, or one that caused it, means that there was no memory left."""
    return any(_is_out_of_memory(cause) for cause in _causes(error))


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    return isinstance(error, RuntimeError) and any(phrase in str(error) for phrase in _MEMORY_PHRASES)


def _is_disk_full(error: BaseException) -> bool:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    if isinstance(error, ServiceError) and error.reason == FailureReason.DISK_FULL:
        return True
    return any(phrase in str(error) for phrase in _DISK_PHRASES)


class _EventWriter:
    """Writes each event as one line, at once, from any thread."""

    def __init__(self, events_fd: int) -> None:
        self._fd = events_fd
        self._lock = threading.Lock()

    def __call__(self, event: ChildEvent) -> None:
        data = memoryview(CHILD_EVENT.encode(event) + b"\n")
        with self._lock:
            while data:
                try:
                    data = data[os.write(self._fd, data) :]
                except BrokenPipeError:
                    # Nobody reads: the worker is gone, and another may own the job already.
                    os._exit(EXIT_ORPHANED)


def _read_line() -> bytes | None:
    """Read up to the first newline, past Python's buffers: the watching thread goes on with the same descriptor."""
    line = b""
    while not line.endswith(b"\n"):
        data = os.read(_STDIN, _READ_BYTES)
        if not data:
            return None
        line += data
        if len(line) > _MAX_ORDER_BYTES:
            raise ValueError("the order is longer than any order may be")
    return line


def _exit_at_end_of_input() -> None:
    while os.read(_STDIN, _READ_BYTES):
        print("ignored: more input after the order", file=sys.stderr)
    os._exit(EXIT_ORPHANED)


def announce_ready(ready_fd: int | None) -> None:
    """Tell the launcher that this role is ready (`--ready-fd N`); without a descriptor nobody asked."""
    if ready_fd is not None:
        os.write(ready_fd, b"ready\n")
        os.close(ready_fd)
