"""The idle team that makes OpenMP's threads sleep: there while others compute, gone after, and others are seen."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import psutil
import torch

from server.inference.spinning import MAX_OTHERS_CORES, OthersMeter, SpinGovernor, is_contended


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.01)


def holds_team() -> bool:
    return any(thread.name == "engine-idle-team" for thread in threading.enumerate())


def test_a_team_is_held_while_others_compute_and_given_back_after() -> None:
    others, enough = [0.0], float(psutil.cpu_count() or 1)
    governor = SpinGovernor(lambda: others[0], interval_seconds=0.01)
    governor.start()
    for _ in range(2):
        others[0] = enough
        wait_until(holds_team)
        others[0] = 0.0
        wait_until(lambda: not holds_team())
    others[0] = enough
    wait_until(holds_team)
    governor.stop()
    assert not holds_team()


def test_a_held_team_has_all_of_openmps_threads_and_they_end_with_it() -> None:
    """In a process where nothing else begins or ends threads."""
    count = "len(os.listdir('/proc/self/task'))"
    code = f"""
import os, time, torch
from server.inference.spinning import IdleTeam
torch.set_num_threads(3)
def wait(threads):
    end = time.monotonic() + 20
    while {count} != threads:
        assert time.monotonic() < end, {count}
        time.sleep(0.01)
before = {count}
team = IdleTeam()
wait(before + 3)
team.release()
wait(before)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_cores_that_our_threads_leave_free_may_be_used() -> None:
    free = len(os.sched_getaffinity(0)) - torch.get_num_threads()
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
