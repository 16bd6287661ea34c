"""Directories of files that are written aside, hashed, flushed and renamed, and checked against their manifest when opened.

Knows nothing of what the files mean. Paths from outside are relative to the root and can never leave it.
"""

import errno
import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from server.diskfiles import flush, hash_file
from server.domain.errors import FailedPrecondition, InvalidInput, ResourceExhausted

MANIFEST_NAME = "manifest.json"
MANIFEST_FORMAT = 1
DIRECTORY_MODE = 0o750
PARTIAL_SUFFIX = ".partial"  # what a killed writer leaves; whoever clears up knows it by this
# Kept free beside what a writer asked for: the database and the logs often share the disk.
RESERVE_BYTES = 64 << 20

# Values of a manifest's description: JSON scalars and lists of them.
Described = str | int | float | bool | list[int] | list[str]


class ArtefactInvalid(FailedPrecondition):
    """An artefact is missing, incomplete or damaged; the message names the file in it, never the server's path."""

    default_reason = "ARTIFACT_INVALID"


class DiskFull(ResourceExhausted):
    """The disk under MODEL_STORAGE_PATH has not the room that is needed."""

    default_reason = "DISK_FULL"


@dataclass(frozen=True, slots=True)
class FileSeal:
    """What a file must be."""

    sha256: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """What an artefact must be: its files and what its writer said of them. `sha256` is the hash of the manifest itself."""

    sha256: str
    size_bytes: int
    files: Mapping[str, FileSeal]
    description: Mapping[str, Described]

    @property
    def total_bytes(self) -> int:
        """The size of all files, the manifest's own included."""
        return self.size_bytes + sum(seal.size_bytes for seal in self.files.values())

    @classmethod
    def parse(cls, data: bytes, expected_sha256: str | None = None) -> "Manifest":
        """Read a manifest's bytes. Raises ArtefactInvalid for what is none, or not the expected one."""
        digest = hashlib.sha256(data).hexdigest()
        if expected_sha256 is not None and digest != expected_sha256:
            raise ArtefactInvalid("The artefact's manifest is not the one that was recorded.")
        try:
            content = json.loads(data)
            files = {name: FileSeal(str(entry["sha256"]), int(entry["size_bytes"])) for name, entry in content["files"].items()}
            if not all(_is_plain(name) for name in files):
                raise unreadable_manifest()
            return cls(digest, len(data), files, dict(content["description"]))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise unreadable_manifest() from None


@dataclass(frozen=True, slots=True)
class Artefact:
    """A verified directory. `manifest_sha256` seals the manifest, and through it every file; `size_bytes` counts all."""

    path: str
    directory: Path
    manifest_sha256: str
    size_bytes: int
    files: Mapping[str, FileSeal]
    description: Mapping[str, Described]


class ArtefactStore:
    """The artefacts below one root directory."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def write(self, path: str, fill: Callable[[Path], Mapping[str, Described]]) -> Artefact:
        """Make the artefact at `path`: `fill` puts its files into an empty directory and returns what the manifest shall say of them.

        The directory appears under its name only when every byte is on the disk; whatever goes wrong before leaves nothing.
        Replaces what stood there. Raises DiskFull, or what `fill` raised.
        """
        target = self._place(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        aside = _make_empty(target.with_name(target.name + PARTIAL_SUFFIX))
        try:
            description = fill(aside)
            _write_manifest(aside, _seal_files(aside), description)
            for written in (*(file for file in aside.rglob("*")), aside):
                flush(written)
            aside.chmod(DIRECTORY_MODE)
            shutil.rmtree(target, ignore_errors=True)
            aside.rename(target)
            flush(target.parent)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise DiskFull("The disk under MODEL_STORAGE_PATH is full.") from error
            raise
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        return self.open(path)

    def open(self, path: str, manifest_sha256: str | None = None) -> Artefact:
        """Check every file of an artefact against its manifest, and that against `manifest_sha256`. Raises ArtefactInvalid."""
        manifest, directory = self.read_manifest(path, manifest_sha256), self._place(path)
        present = {str(file.relative_to(directory)) for file in directory.rglob("*") if not file.is_dir()}
        if foreign := present - manifest.files.keys() - {MANIFEST_NAME}:
            raise ArtefactInvalid(f"The artefact holds {min(foreign)}, which its manifest does not name.")
        for name, seal in manifest.files.items():
            check_file(directory / name, name, seal)
        return Artefact(path, directory, manifest.sha256, manifest.total_bytes, manifest.files, manifest.description)

    def open_file(self, path: str, name: str, manifest_sha256: str) -> Path:
        """Check one file of an artefact, the manifest itself among them, and give its place. Raises ArtefactInvalid."""
        manifest = self.read_manifest(path, manifest_sha256)
        file = self._place(path) / name
        if name != MANIFEST_NAME:
            if name not in manifest.files:
                raise ArtefactInvalid(f"The artefact has no file {name}.")
            check_file(file, name, manifest.files[name])
        return file

    def read_manifest(self, path: str, manifest_sha256: str | None = None) -> Manifest:
        """Read what an artefact must be, without looking at its files. Raises ArtefactInvalid."""
        try:
            data = (self._place(path) / MANIFEST_NAME).read_bytes()
        except OSError:
            raise unreadable_manifest() from None
        return Manifest.parse(data, manifest_sha256)

    def delete(self, path: str) -> None:
        """Remove an artefact, or any directory below the root, if it is there. It is gone from its name at once."""
        target = self._place(path)
        if not target.exists():
            return
        aside = _make_empty(target.with_name(target.name + PARTIAL_SUFFIX))
        target.rename(aside / target.name)
        shutil.rmtree(aside)

    def require_space(self, size_bytes: int) -> None:
        """Raise DiskFull where the disk has not `size_bytes` and a reserve left."""
        self._root.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self._root).free
        if free < size_bytes + RESERVE_BYTES:
            raise DiskFull(
                f"The disk under MODEL_STORAGE_PATH has {free >> 20} MiB left; {(size_bytes + RESERVE_BYTES) >> 20} MiB are needed."
            )

    def locate(self, path: str) -> Path:
        """Give the place of a file that is to be read, below the root. Raises InvalidInput for a path that could lead out of it."""
        return self._place(path)

    def _place(self, path: str) -> Path:
        located = self._root.joinpath(*PurePosixPath(path).parts)
        if not _is_plain(path) or not located.resolve().is_relative_to(self._root.resolve()):
            raise InvalidInput.field("path", "is no path inside the storage")
        return located


def _is_plain(path: str) -> bool:
    """Tell whether a relative path stays below where it starts, and hides nothing."""
    parts = PurePosixPath(path).parts
    return bool(parts) and not path.startswith("/") and not any(part.startswith(".") or "\0" in part for part in parts)


def _make_empty(directory: Path) -> Path:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    return directory


def unreadable_manifest() -> ArtefactInvalid:
    """Make the error of an artefact that is not there, or not whole."""
    return ArtefactInvalid("The artefact has no readable manifest.")


def check_file(file: Path, name: str, seal: FileSeal) -> None:
    """Compare a file with its seal. Raises ArtefactInvalid naming it."""
    if file.is_symlink() or not file.is_file():
        raise ArtefactInvalid(f"The artefact's file {name} is missing.")
    if file.stat().st_size != seal.size_bytes or hash_file(file) != seal.sha256:
        raise ArtefactInvalid(f"The artefact's file {name} is not the one that was written.")


def _seal_files(directory: Path) -> dict[str, FileSeal]:
    files = sorted(file for file in directory.rglob("*") if file.is_file())
    return {str(file.relative_to(directory)): FileSeal(hash_file(file), file.stat().st_size) for file in files}


def _write_manifest(directory: Path, files: Mapping[str, FileSeal], description: Mapping[str, Described]) -> None:
    content = {
        "format": MANIFEST_FORMAT,
        "files": {name: {"sha256": seal.sha256, "size_bytes": seal.size_bytes} for name, seal in files.items()},
        "description": dict(description),
    }
    (directory / MANIFEST_NAME).write_text(json.dumps(content, indent=1, sort_keys=True))
