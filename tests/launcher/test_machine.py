"""What this machine has, as the estimate is told it."""

import os
import stat
from pathlib import Path

import psutil
import pytest

from server.launcher.machine import measure_machine


def _pretend_driver(directory: Path, answer: str) -> None:
    directory.mkdir()
    driver = directory / "nvidia-smi"
    driver.write_text(f"#!/bin/sh\nprintf '{answer}'\n")
    driver.chmod(driver.stat().st_mode | stat.S_IXUSR)


def test_a_training_job_may_take_most_of_the_memory_and_no_more_than_there_is() -> None:
    machine = measure_machine(None)
    assert 0 < machine.memory_bytes < psutil.virtual_memory().total
    assert machine.cores == len(os.sched_getaffinity(0))


def test_a_limit_that_was_set_wins() -> None:
    assert measure_machine(3 << 30).memory_bytes == 3 << 30


@pytest.mark.parametrize(("answer", "expected"), [("143771\\n81559\\n", 81_559 << 20), ("", 0), ("No devices were found\\n", 0)])
def test_the_driver_tells_of_the_smallest_accelerator(answer: str, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _pretend_driver(tmp_path / "bin", answer)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    assert measure_machine(None).device_memory_bytes == expected


def test_without_a_driver_there_is_no_accelerator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert measure_machine(None).device_memory_bytes == 0
