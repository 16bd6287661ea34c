"""How often the kernel has killed processes because memory ran out: a count that grew while a child ended tells why it was killed."""

from collections.abc import Iterator
from pathlib import Path

_KEY = "oom_kill"


def count_memory_kills(root: Path = Path("/")) -> int:
    """Give a number that grows with each process that the kernel kills for memory, in this container or on this machine.

    Read from memory.events (https://docs.kernel.org/admin-guide/cgroup-v2.html), memory.oom_control
    (https://docs.kernel.org/admin-guide/cgroup-v1/memory.html) and /proc/vmstat; what is not there counts nothing.
    """
    return sum(_read_count(path) for path in (*_list_cgroup_counts(root), root / "proc/vmstat"))


def _list_cgroup_counts(root: Path) -> Iterator[Path]:
    """Give the files that count for the control group of this process, under either version of control groups."""
    groups = root / "sys/fs/cgroup"
    for line in _read_lines(root / "proc/self/cgroup"):
        _, controllers, group = line.split(":", 2)
        if not controllers:
            yield groups / group.lstrip("/") / "memory.events"
        elif "memory" in controllers.split(","):
            yield groups / "memory" / group.lstrip("/") / "memory.oom_control"


def _read_count(path: Path) -> int:
    """Read the count out of a file of `name value` lines; 0 where it has none, or is not there."""
    return sum(int(fields[1]) for fields in map(str.split, _read_lines(path)) if len(fields) == 2 and fields[0] == _KEY)


def _read_lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
