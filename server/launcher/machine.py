"""What this machine has: its memory as far as its container may use it, its accelerator as the driver tells, its cores."""

import os
import shutil
import subprocess
from pathlib import Path

import psutil

from server.services.machine import Machine

# The database, the api and the system need the rest.
MEMORY_SHARE = 0.9
# cgroup v2 and v1: the limit of a container.
_LIMIT_PATHS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
_DRIVER_SECONDS = 10.0


def measure_machine(memory_limit_bytes: int | None) -> Machine:
    """Measure what a training job may take; a limit that was set wins."""
    memory = int(MEMORY_SHARE * min([psutil.virtual_memory().total, *_read_limits()]))
    return Machine(
        memory_bytes=memory_limit_bytes or memory,
        device_memory_bytes=_ask_driver(),
        cores=len(os.sched_getaffinity(0)),
    )


def _read_limits() -> list[int]:
    limits = []
    for path in _LIMIT_PATHS:
        try:
            limits.append(int(path.read_text()))
        except (OSError, ValueError):  # no such controller, or "max"
            continue
    return limits


def _ask_driver() -> int:
    """Ask NVIDIA's driver for the memory of the smallest accelerator, in bytes; 0 without one."""
    if shutil.which("nvidia-smi") is None:
        return 0
    question = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(question, capture_output=True, text=True, check=True, timeout=_DRIVER_SECONDS)
    except (OSError, subprocess.SubprocessError):
        return 0
    sizes = [int(line) << 20 for line in answer.stdout.split() if line.isdecimal()]
    return min(sizes, default=0)
