"""The kernel's counts of processes that it killed for memory, under both versions of control groups."""

from pathlib import Path

import pytest

from server.jobs.memory_kills import count_memory_kills


def _write(root: Path, path: str, text: str) -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(text)


@pytest.mark.parametrize(
    ("group", "path", "text"),
    [
        ("0::/", "sys/fs/cgroup/memory.events", "low 0\noom 7\noom_kill {}\noom_group_kill 9\n"),
        ("0::/user.slice/a", "sys/fs/cgroup/user.slice/a/memory.events", "oom_kill {}\n"),
        ("5:cpu,memory:/pod", "sys/fs/cgroup/memory/pod/memory.oom_control", "oom_kill_disable 0\nunder_oom 0\noom_kill {}\n"),
        ("0::/", "proc/vmstat", "pgfault 12\noom_kill {}\n"),
    ],
)
def test_each_place_that_counts_is_read(tmp_path: Path, group: str, path: str, text: str) -> None:
    _write(tmp_path, "proc/self/cgroup", f"9:cpuset:/\n{group}\n")
    counts = []
    for kills in (0, 1, 3):
        _write(tmp_path, path, text.format(kills))
        counts.append(count_memory_kills(tmp_path))
    assert counts == [0, 1, 3]


def test_a_machine_that_counts_nothing_has_none(tmp_path: Path) -> None:
    assert count_memory_kills(tmp_path) == 0


def test_this_machine_is_read_without_complaint() -> None:
    assert count_memory_kills() >= 0
