"""Local copies of what lies in remote storage, at the same relative paths; what was used longest ago makes room for what is needed.

Several processes share one mirror: every file appears whole, and nobody waits for anybody.
"""

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from server.storage.artefacts import PARTIAL_SUFFIX
from server.storage.objects import RemoteObjects

# Whoever opened a copy has it in memory, or its files open, by then.
_SPARED_SECONDS = 600.0
# Below an organization: what may be dropped, since the remote storage has it. Logs and orders of jobs are nowhere else.
_COPIES = ("models/*/*", "jobs/*/checkpoint-*", "datasets/*/*", "documents/*/*")


@dataclass(frozen=True, slots=True)
class _Copy:
    path: Path
    size_bytes: int
    last_use: float


class Mirror:
    """The copies below `root`, together at most `max_bytes` (one that is larger, or in use, still stays)."""

    def __init__(self, root: Path, objects: RemoteObjects, max_bytes: int) -> None:
        self.root = root
        self.objects = objects
        self._max_bytes = max_bytes

    def download(self, key: str, target: Path) -> None:
        """Copy an object to `target`, which appears whole or not at all. Raises FileNotFoundError, StorageUnavailable."""
        target.parent.mkdir(parents=True, exist_ok=True)
        aside = self.root / f"{uuid4().hex}{PARTIAL_SUFFIX}"
        try:
            self.objects.download(key, aside)
            aside.replace(target)
        finally:
            aside.unlink(missing_ok=True)

    def touch(self, copy: Path) -> None:
        """Note that a copy is being used."""
        with suppress(FileNotFoundError):  # another process has just dropped it: whoever reads next fetches it again
            os.utime(copy)

    def make_room(self, size_bytes: int) -> None:
        """Drop what was used longest ago until so many bytes more fit."""
        copies = sorted(self._list(), key=lambda copy: copy.last_use)
        over = sum(copy.size_bytes for copy in copies) + size_bytes - self._max_bytes
        spared = time.time() - _SPARED_SECONDS
        for copy in copies:
            if over <= 0 or copy.last_use > spared:
                return
            remove(copy.path)
            over -= copy.size_bytes

    def _list(self) -> Iterator[_Copy]:
        for pattern in _COPIES:
            for path in self.root.glob(f"*/{pattern}"):
                with suppress(FileNotFoundError):
                    if not path.name.endswith(PARTIAL_SUFFIX):
                        yield _Copy(path, sum(file.stat().st_size for file in (path, *path.rglob("*"))), path.stat().st_mtime)


def remove(path: Path) -> None:
    """Remove a file or a directory with all in it, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
