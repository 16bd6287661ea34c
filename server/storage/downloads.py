"""Artefacts as streams to callers: one file, or all as a tar archive. Every hash is checked before the first byte goes out.

Before, not meanwhile: over HTTP/1.1 a stream that fails midway looks like one that ended.
"""

import asyncio
import io
import tarfile
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path

from server.domain.errors import NotFound
from server.domain.models import ModelFile
from server.storage.artefacts import MANIFEST_NAME, ArtefactInvalid, ArtefactStore, Manifest

# A gRPC message; a reader that stops holds a few of them, whatever the file's size.
PIECE_BYTES = 1 << 20
FILE_MODE = 0o644


class ArtefactDownloads:
    """Reads from an artefact store, its blocking work in threads."""

    def __init__(self, store: ArtefactStore) -> None:
        self._store = store

    async def list_files(self, path: str, manifest_sha256: str) -> Sequence[ModelFile]:
        """List the files by their paths, the manifest among them. Raises ArtefactInvalid."""
        return _list_files(await asyncio.to_thread(self._store.read_manifest, path, manifest_sha256))

    async def read_file(self, path: str, manifest_sha256: str, name: str) -> AsyncGenerator[bytes, None]:
        """Stream one file in pieces, at least one. Raises NotFound, ArtefactInvalid."""
        listed = {file.path: file for file in await self.list_files(path, manifest_sha256)}
        if name not in listed:
            raise NotFound.of("file", name)
        place = await asyncio.to_thread(self._store.open_file, path, name, manifest_sha256)
        if not listed[name].size_bytes:
            yield b""
        async for piece in _read(place, listed[name]):
            yield piece

    async def read_archive(self, path: str, manifest_sha256: str, directory: str) -> AsyncGenerator[bytes, None]:
        """Stream all files as a tar archive: sorted, without owners and times, so that the same files give the same bytes."""
        artefact = await asyncio.to_thread(self._store.open, path, manifest_sha256)
        for file in await self.list_files(path, manifest_sha256):
            yield _make_header(f"{directory}/{file.path}", file.size_bytes)
            async for piece in _read(artefact.directory / file.path, file):
                yield piece
            yield bytes(-file.size_bytes % tarfile.BLOCKSIZE)
        yield bytes(2 * tarfile.BLOCKSIZE)


def _list_files(manifest: Manifest) -> list[ModelFile]:
    files = [ModelFile(name, seal.size_bytes, seal.sha256) for name, seal in manifest.files.items()]
    return sorted([*files, ModelFile(MANIFEST_NAME, manifest.size_bytes, manifest.sha256)], key=lambda file: file.path)


async def _read(place: Path, file: ModelFile) -> AsyncGenerator[bytes, None]:
    """Give a checked file's bytes. Raises ArtefactInvalid where it is no longer what was checked."""
    left = file.size_bytes
    try:
        with await asyncio.to_thread(io.FileIO, place) as source:
            while left and (piece := await asyncio.to_thread(source.read, min(PIECE_BYTES, left))):
                left -= len(piece)
                yield piece
    except OSError:
        raise ArtefactInvalid(f"The artefact's file {file.path} is missing.") from None
    if left:
        raise ArtefactInvalid(f"The artefact's file {file.path} is not the one that was written.")


def _make_header(name: str, size_bytes: int) -> bytes:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode, entry.mtime = size_bytes, FILE_MODE, 0
    return entry.tobuf(tarfile.PAX_FORMAT)
