"""Directories of job files, on this machine's disk or in remote storage, as one who clears up sees them: names, ages, removal."""

import logging
import os
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Protocol

from server.storage.artefacts import MANIFEST_NAME
from server.storage.objects import RemoteObjects, StorageUnavailable

_logger = logging.getLogger(__name__)


class Tree(Protocol):
    """Files and directories by path relative to the storage; the root is the empty path."""

    def list(self, path: str) -> list[str]:
        """Give the names directly below a directory, sorted; none for what is no directory."""

    def newest_change(self, path: str) -> float:
        """Give when anything at or below the path last changed, in seconds since 1970."""

    def remove(self, path: str) -> None:
        """Remove a file or a directory. What cannot go now is logged: it goes with a sweep, and nobody's end depends on it."""


class DiskTree:
    """Files below a directory of this machine."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def list(self, path: str) -> list[str]:
        """Give the names directly below a directory."""
        directory = self._root / path
        return sorted(found.name for found in directory.iterdir()) if directory.is_dir() else []

    def newest_change(self, path: str) -> float:
        """Give the newest change at or below the path."""
        place = self._root / path
        newest = place.lstat().st_mtime
        for directory, _, names in os.walk(place):
            newest = max(newest, *(os.lstat(os.path.join(directory, name)).st_mtime for name in [".", *names]))
        return newest

    def remove(self, path: str) -> None:
        """Remove a file or a directory."""
        place = self._root / path
        try:
            if place.is_dir() and not place.is_symlink():
                shutil.rmtree(place)
            else:
                place.unlink(missing_ok=True)
        except OSError as error:
            _logger.warning("cannot remove %s: %s", place, error)


class ObjectTree:
    """Objects at or below a prefix of remote storage, as one listing showed them when this was made. Raises StorageUnavailable then."""

    def __init__(self, objects: RemoteObjects, prefix: str = "") -> None:
        self._objects = objects
        self._children: dict[str, set[str]] = defaultdict(set)
        self._newest: dict[str, float] = defaultdict(float)
        for entry in objects.list(prefix):
            parts = entry.key.split("/")
            for depth in range(len(parts)):
                above, path = "/".join(parts[:depth]), "/".join(parts[: depth + 1])
                self._children[above].add(parts[depth])
                self._newest[path] = max(self._newest[path], entry.modified)

    def list(self, path: str) -> list[str]:
        """Give the names directly below a directory."""
        return sorted(self._children.get(path, ()))

    def newest_change(self, path: str) -> float:
        """Give the newest change at or below the path."""
        return self._newest[path]

    def remove(self, path: str) -> None:
        """Remove an object or a directory of them; its manifest first, so that it is gone at once."""
        remove_objects(self._objects, path)


def remove_objects(objects: RemoteObjects, path: str) -> None:
    """Remove an artefact, or all objects at or below a path. What cannot go now is logged."""
    try:
        objects.delete_tree(path, first=MANIFEST_NAME)
    except StorageUnavailable as error:
        _logger.warning("cannot remove %s: %s", path, error)
