"""Artefacts in remote storage: built and hashed on this machine, uploaded with the manifest last, read through verified local copies.

An artefact without a manifest does not exist, so an upload that breaks off leaves nothing that anybody would open.
"""

import logging
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from server.storage.artefacts import (
    MANIFEST_NAME,
    PARTIAL_SUFFIX,
    Artefact,
    ArtefactInvalid,
    ArtefactStore,
    Described,
    Manifest,
    check_file,
    unreadable_manifest,
)
from server.storage.mirror import Mirror, remove
from server.storage.objects import StorageUnavailable

_logger = logging.getLogger(__name__)


class RemoteArtefactStore(ArtefactStore):
    """The artefacts below one URL. Every method may raise StorageUnavailable besides what the local store raises."""

    def __init__(self, mirror: Mirror) -> None:
        super().__init__(mirror.root)
        self._mirror = mirror

    def write(self, path: str, fill: Callable[[Path], Mapping[str, Described]]) -> Artefact:
        """Make the artefact at `path`: built here, then uploaded. Whatever goes wrong before the manifest is there leaves no artefact."""
        place = self._place(path)
        staged = super().write(path + PARTIAL_SUFFIX, fill)
        try:
            self._upload(path, staged)
            remove(place)
            staged.directory.rename(place)
        finally:
            remove(staged.directory)
        return replace(staged, path=path, directory=place)

    def open(self, path: str, manifest_sha256: str | None = None) -> Artefact:
        """Check every file, fetched first where this machine has no good copy. Raises ArtefactInvalid."""
        try:
            artefact = super().open(path, manifest_sha256)
        except ArtefactInvalid:
            manifest = self._fetch_manifest(path, manifest_sha256)
            self._fetch_files(path, manifest, manifest.files)
            artefact = super().open(path, manifest.sha256)
        self._mirror.touch(artefact.directory)
        return artefact

    def open_file(self, path: str, name: str, manifest_sha256: str) -> Path:
        """Check one file, fetched first where this machine has no good copy; no other file is. Raises ArtefactInvalid."""
        try:
            return super().open_file(path, name, manifest_sha256)
        except ArtefactInvalid:
            manifest = self._fetch_manifest(path, manifest_sha256)
            self._fetch_files(path, manifest, {name} & manifest.files.keys())
            return super().open_file(path, name, manifest_sha256)

    def read_manifest(self, path: str, manifest_sha256: str | None = None) -> Manifest:
        """Read what an artefact must be, from here or from the remote storage. Raises ArtefactInvalid."""
        try:
            return super().read_manifest(path, manifest_sha256)
        except ArtefactInvalid:
            return self._fetch_manifest(path, manifest_sha256)

    def delete(self, path: str) -> None:
        """Remove an artefact: its manifest first, so that it is gone at once."""
        self._mirror.objects.delete_tree(self._key(path), first=MANIFEST_NAME)
        super().delete(path)

    def locate(self, path: str) -> Path:
        """Give a local copy of a plain file. Raises ArtefactInvalid where there is none."""
        place = self._place(path)
        if not place.exists():
            try:
                self._mirror.download(self._key(path), place)
            except FileNotFoundError:
                raise ArtefactInvalid(f"The file {place.name} is missing in the storage.") from None
        self._mirror.touch(place)
        return place

    def _upload(self, path: str, staged: Artefact) -> None:
        objects, key = self._mirror.objects, self._key(path)
        objects.delete_tree(key, first=MANIFEST_NAME)
        try:
            for name in (*sorted(staged.files), MANIFEST_NAME):
                objects.upload(staged.directory / name, f"{key}/{name}")
        except StorageUnavailable:
            with suppress(StorageUnavailable):  # what cannot be removed now goes with a sweep
                objects.delete_tree(key, first=MANIFEST_NAME)
            raise

    def _fetch_manifest(self, path: str, manifest_sha256: str | None) -> Manifest:
        try:
            data = self._mirror.objects.read(f"{self._key(path)}/{MANIFEST_NAME}")
        except FileNotFoundError:
            raise unreadable_manifest() from None
        return Manifest.parse(data, manifest_sha256)

    def _fetch_files(self, path: str, manifest: Manifest, names: Collection[str]) -> None:
        """Copy what is missing or damaged here; the caller checks what came."""
        place, key = self._place(path), self._key(path)
        missing = [name for name in sorted(names) if not _is_good(place / name, name, manifest)]
        size_bytes = sum(manifest.files[name].size_bytes for name in missing)
        self._mirror.make_room(size_bytes)
        self.require_space(size_bytes)
        for name in (*missing, MANIFEST_NAME):
            try:
                self._mirror.download(f"{key}/{name}", place / name)
            except FileNotFoundError:
                raise ArtefactInvalid(f"The artefact's file {name} is missing.") from None
        _logger.info("fetched %d files, %d MiB, of %s", len(missing), size_bytes >> 20, path)

    def _key(self, path: str) -> str:
        return self._place(path).relative_to(self._root).as_posix()


def _is_good(file: Path, name: str, manifest: Manifest) -> bool:
    try:
        check_file(file, name, manifest.files[name])
    except ArtefactInvalid:
        return False
    return True
