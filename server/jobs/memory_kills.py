"""How often the kernel has killed processes because memory ran out: a count that grew while a child ended tells why it was killed."""

from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")
# Where the count stands, and its name there. https://docs.kernel.org/admin-guide/cgroup-v2.html (memory.events),
# https://docs.kernel.org/admin-guide/cgroup-v1/memory.html (memory.oom_control); vmstat counts those of the whole machine.
_KEY = "oom_kill"
_MACHINE_COUNT = Path("/proc/vmstat")


def count_memory_kills() -> int:
    """Give a number that grows with each process that the kernel kills for memory, in this container or on this machine."""
    return sum(_read_count(path) for path in (*_list_cgroup_counts(), _MACHINE_COUNT))


def _list_cgroup_counts() -> list[Path]:
    """Give the files that count for the control group of this process, under either version of control groups."""
    counts = []
    for line in _read_lines(Path("/proc/self/cgroup")):
        _, controllers, group = line.split(":", 2)
        if not controllers:
            counts.append(_CGROUPS / group.lstrip("/") / "memory.events")
        elif "memory" in controllers.split(","):
            counts.append(_CGROUPS / "memory" / group.lstrip("/") / "memory.oom_control")
    return counts


def _read_count(path: Path) -> int:
    """Read the count out of a file of `name value` lines; 0 where it has none, or is not there."""
    fields = (line.split() for line in _read_lines(path))
    return sum(int(value) for name, value in (each for each in fields if len(each) == 2) if name == _KEY)


def _read_lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
