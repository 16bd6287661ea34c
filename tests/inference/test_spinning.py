"""The idle team that makes OpenMP's threads sleep: there while others compute, gone after, and others are seen."""

import os
import subprocess
import sys
import time
from collections.abc import Callable

import psutil
import torch

from server.inference.spinning import MAX_OTHERS_CORES, OthersMeter, SpinGovernor, is_contended


def count_threads() -> int:
    return len(os.listdir("/proc/self/task"))


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.01)


def test_a_team_is_held_while_others_compute_and_given_back_after() -> None:
    torch.zeros(1 << 17).add_(1)  # this thread's own team
    others, before = [0.0], count_threads()
    governor = SpinGovernor(lambda: others[0], interval_seconds=0.01)
    governor.start()
    others[0] = float(psutil.cpu_count() or 1)
    # The governor's thread, the one that holds the team, and the team's others.
    wait_until(lambda: count_threads() == before + 1 + torch.get_num_threads())
    others[0] = 0.0
    wait_until(lambda: count_threads() == before + 1)
    others[0] = float(psutil.cpu_count() or 1)
    wait_until(lambda: count_threads() == before + 1 + torch.get_num_threads())
    governor.stop()
    wait_until(lambda: count_threads() == before)


def test_cores_that_our_threads_leave_free_may_be_used() -> None:
    free = (psutil.cpu_count() or 1) - torch.get_num_threads()
    assert not is_contended(free + MAX_OTHERS_CORES - 0.01)
    assert is_contended(max(0, free) + MAX_OTHERS_CORES + 0.01)


def test_what_another_process_computes_is_seen() -> None:
    meter = OthersMeter()
    burner = subprocess.Popen([sys.executable, "-c", "while True: pass"])

    def is_seen() -> bool:
        time.sleep(0.2)
        return meter.measure() > MAX_OTHERS_CORES

    try:
        wait_until(is_seen)
    finally:
        burner.kill()
        burner.wait()


def test_what_this_process_computes_is_not_taken_for_others() -> None:
    meter, began = OthersMeter(), time.monotonic()
    others_before = psutil.cpu_times().idle
    while time.monotonic() - began < 0.5:
        pass
    idle_cores = (psutil.cpu_times().idle - others_before) / 0.5
    # All cores less the idle ones less our own one, with the clock's ticks as room.
    assert meter.measure() <= (psutil.cpu_count() or 1) - idle_cores - 1 + 0.3
