"""Plain files in remote storage: streamed to this machine first, then uploaded whole; read from copies here."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

from server.domain.errors import NotFound
from server.services.ports import StoredFile
from server.storage.artefacts import MANIFEST_NAME
from server.storage.files import LocalFiles
from server.storage.mirror import Mirror


class RemoteFiles(LocalFiles):
    """Files below one URL. Every method may raise StorageUnavailable besides what the local ones raise."""

    def __init__(self, mirror: Mirror) -> None:
        super().__init__(mirror.root)
        self._mirror = mirror

    async def write(self, path: str, data: AsyncIterator[bytes], max_bytes: int) -> StoredFile:
        """Stream to this machine's disk, then upload; the object appears whole or not at all, and stays here as a copy."""
        stored = await super().write(path, data, max_bytes)
        place = self._locate(path)
        try:
            await asyncio.to_thread(self._mirror.objects.upload, place, path)
        except BaseException:
            place.unlink(missing_ok=True)
            raise
        await asyncio.to_thread(self._mirror.make_room, 0)
        return stored

    async def fetch(self, path: str) -> Path:
        """Give a copy on this machine's disk. Raises NotFound."""
        place = self._locate(path)
        if not place.exists():
            try:
                await asyncio.to_thread(self._mirror.download, path, place)
            except FileNotFoundError:
                raise NotFound.of("file", place.name) from None
        self._mirror.touch(place)
        return place

    async def delete_tree(self, path: str) -> None:
        """Remove a file or a directory with all in it, if it is there."""
        self._locate(path)
        await asyncio.to_thread(self._mirror.objects.delete_tree, path, MANIFEST_NAME)
        await super().delete_tree(path)
