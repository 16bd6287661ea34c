"""An executor whose one thread ends when it has nothing to do, so that what libraries keep per thread goes with it.

libgomp keeps a team of threads for each thread that ever computed in parallel. Once these teams together have more threads than the
machine has cores, each waits asleep instead of spinning, and every small operation then pays for a wake-up: with the idle team of a loader
beside it, a step of SmolLM2 took 19 ms instead of 13 (two cores).
"""

import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future
from queue import Empty, SimpleQueue
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

# Requests that follow each other share the thread; one that pauses frees the cores for those who generate.
IDLE_SECONDS = 0.05


class PassingThread(Executor):
    """Runs what is submitted in order, in one thread at a time. `initializer` runs at the beginning of each."""

    def __init__(self, name: str, initializer: Callable[[], None] | None = None, *, idle_seconds: float = IDLE_SECONDS) -> None:
        self._name, self._initializer, self._idle_seconds = name, initializer, idle_seconds
        self._work: SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = SimpleQueue()
        self._lock = threading.Lock()  # between the end of a thread and a submission
        self._thread: threading.Thread | None = None
        self._is_shut = False

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Run a function in its turn. Raises RuntimeError after `shutdown`."""
        future: Future[T] = Future()
        with self._lock:
            if self._is_shut:
                raise RuntimeError(f"{self._name} was shut down")
            self._work.put((future, lambda: fn(*args, **kwargs)))
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=self._name)
                self._thread.start()
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more work; where asked, forget what waits, and wait for what runs."""
        with self._lock:
            self._is_shut, thread = True, self._thread
            while cancel_futures and not self._work.empty():
                self._work.get_nowait()[0].cancel()
        if wait and thread is not None:
            thread.join()

    def _run(self) -> None:
        if self._initializer is not None:
            self._initializer()
        while (item := self._take()) is not None:
            future, work = item
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(work())
                except BaseException as error:  # handed on to who asked, whatever it is
                    future.set_exception(error)
            del item, future, work  # nothing stays alive for an idle thread

    def _take(self) -> tuple[Future[Any], Callable[[], Any]] | None:
        try:
            return self._work.get(timeout=self._idle_seconds)
        except Empty:
            with self._lock:
                if not self._work.empty():
                    return self._work.get_nowait()
                self._thread = None
                return None
