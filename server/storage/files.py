"""Plain files under MODEL_STORAGE_PATH: uploads streamed to disk, flushed, whole or not there. Knows nothing of what they mean."""

import asyncio
import errno
import hashlib
import os
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

from server.domain.errors import ResourceExhausted
from server.services.ports import StoredFile

# Left free for everybody else: an upload stops before the disk is full.
RESERVED_BYTES = 256 << 20


class LocalFiles:
    """Files on a local disk, named by paths relative to one root."""

    def __init__(self, root: Path) -> None:
        self._root = root

    async def write(self, path: str, data: AsyncIterator[bytes], max_bytes: int) -> StoredFile:
        """Stream to `path`, aside and renamed once whole and flushed. Raises ResourceExhausted; leaves nothing behind on any failure."""
        target = self._locate(path)
        aside = target.with_name(target.name + ".partial")
        digest, size = hashlib.sha256(), 0
        try:
            await asyncio.to_thread(target.parent.mkdir, parents=True, exist_ok=True)
            with open(aside, "wb") as file:
                async for piece in data:
                    size += len(piece)
                    if size > max_bytes:
                        raise ResourceExhausted(f"The upload is larger than {max_bytes:,} bytes.", reason="UPLOAD_TOO_LARGE")
                    await asyncio.to_thread(self._append, file.fileno(), piece, digest)
                await asyncio.to_thread(os.fsync, file.fileno())
            await asyncio.to_thread(os.replace, aside, target)
        except OSError as error:
            aside.unlink(missing_ok=True)
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise _disk_full() from None
            raise
        except BaseException:
            aside.unlink(missing_ok=True)
            raise
        return StoredFile(size, digest.hexdigest())

    def _append(self, descriptor: int, piece: bytes, digest: "hashlib._Hash") -> None:
        space = os.fstatvfs(descriptor)
        if space.f_bavail * space.f_frsize < RESERVED_BYTES + len(piece):
            raise _disk_full()
        view = memoryview(piece)
        while view:
            view = view[os.write(descriptor, view) :]
        digest.update(piece)

    async def fetch(self, path: str) -> Path:
        """Give the place of a stored file on this machine's disk."""
        return self._locate(path)

    async def delete_tree(self, path: str) -> None:
        """Remove a file or a directory with all in it, if it is there."""
        target = self._locate(path)
        if target.is_dir():
            await asyncio.to_thread(shutil.rmtree, target, ignore_errors=True)
        else:
            target.unlink(missing_ok=True)

    def _locate(self, path: str) -> Path:
        target = (self._root / path).resolve()
        if not target.is_relative_to(self._root.resolve()) or target == self._root.resolve():
            raise ValueError("a path leads out of the storage root")
        return target


def _disk_full() -> ResourceExhausted:
    return ResourceExhausted("The server's disk is full. Nothing of the upload was kept.", reason="DISK_FULL")
