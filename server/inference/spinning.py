"""Lets OpenMP's threads wait awake while the cores are this process's own, and asleep while others compute too.

A step of a small model has some 200 products, each of which wakes the other threads: awake ones take it up at once (a step of SmolLM2
13.3 ms instead of 15.6), but they take the cores from a training beside them (both 2 to 4 times slower). libgomp reads GOMP_SPINCOUNT
once, but waits asleep whenever a process has more of its threads than cores: an idle team beside the computing one does that.
"""

import os
import threading
import time
from collections.abc import Callable

import psutil
import torch

INTERVAL_SECONDS = 0.25
# What others may compute beside full teams of ours, in cores: streaming to many clients takes less, a job more.
MAX_OTHERS_CORES = 0.5
# Numbers that torch adds to by all threads.
PARALLEL_NUMBERS = 1 << 17


class OthersMeter:
    """Measures how many cores all other processes of the machine kept busy since it was asked before."""

    def __init__(self) -> None:
        self._last = self._read()

    def measure(self) -> float:
        """Give the cores, at least 0."""
        before, self._last = self._last, self._read()
        seconds, machine, own = (now - then for now, then in zip(self._last, before, strict=True))
        return max(0.0, (machine - own) / max(seconds, 1e-3))

    @staticmethod
    def _read() -> tuple[float, float, float]:
        times = psutil.cpu_times()
        return time.monotonic(), sum(times) - times.idle - getattr(times, "iowait", 0.0), time.process_time()


class IdleTeam:
    """A thread that made OpenMP start a team for it, and holds it until it is released."""

    def __init__(self) -> None:
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._hold, name="engine-idle-team", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """End the thread, and its team with it."""
        self._released.set()
        self._thread.join()

    def _hold(self) -> None:
        torch.zeros(PARALLEL_NUMBERS).add_(1)
        self._released.wait()


class SpinGovernor:
    """Holds an idle team while others need the cores. `measure` gives the cores that others keep busy."""

    def __init__(self, measure: Callable[[], float], *, interval_seconds: float = INTERVAL_SECONDS) -> None:
        self._measure, self._interval_seconds = measure, interval_seconds
        self._team: IdleTeam | None = None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="engine-spins", daemon=True)

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def stop(self) -> None:
        """Look no more, and hold nothing."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while not self._stopped.wait(self._interval_seconds):
            self._set(is_contended(self._measure()))
        self._set(False)

    def _set(self, contended: bool) -> None:
        if contended and self._team is None:
            self._team = IdleTeam()
        elif not contended and self._team is not None:
            self._team.release()
            self._team = None


def is_contended(others_cores: float) -> bool:
    """Tell whether others compute so much that our threads, waiting awake, would take it from them."""
    free = len(os.sched_getaffinity(0)) - torch.get_num_threads()
    return others_cores > max(0, free) + MAX_OTHERS_CORES
