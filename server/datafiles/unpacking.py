"""Packed files, recognised by their first bytes and unpacked as a stream that ends where it becomes larger than it may be."""

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

from server.domain.datasets import Compression

MAGIC = {Compression.GZIP: b"\x1f\x8b", Compression.ZSTD: b"\x28\xb5\x2f\xfd"}
# The window that zstd's --ultra -22 takes. A file that asks for more would have its reader allocate it.
MAX_ZSTD_WINDOW_BYTES = 1 << 27
BUFFER_BYTES = 1 << 20
ZSTD_READ_BYTES = 4 << 10  # the worst of bombs makes 128 MB of it


class FileInvalid(ValueError):
    """A file cannot be read, or not on from some place: `code` is stable, the message is for a person."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


def recognise_compression(path: Path) -> Compression | None:
    """Tell how a file is packed."""
    with path.open("rb") as file:
        head = file.read(4)
    return next((compression for compression, magic in MAGIC.items() if head.startswith(magic)), None)


@contextmanager
def unpack(path: Path, compression: Compression | None, max_bytes: int | None = None) -> Iterator[io.BufferedIOBase]:
    """Open the unpacked bytes. Reading them raises FileInvalid where they are damaged, or more than `max_bytes`."""
    with path.open("rb") as file, io.BufferedReader(_Bounded(_open_stream(file, compression), max_bytes), BUFFER_BYTES) as stream:
        yield stream


def _open_stream(file: BinaryIO, compression: Compression | None) -> BinaryIO:
    if compression is Compression.GZIP:
        return cast("BinaryIO", gzip.GzipFile(fileobj=file, mode="rb"))
    if compression is Compression.ZSTD:
        return cast("BinaryIO", _ZstdStream(file))
    return file


class _ZstdStream:
    """Unpacks frame by frame, and sees where the last one is cut off: zstandard's own reader takes that for an end."""

    def __init__(self, file: BinaryIO) -> None:
        import zstandard

        self._file = file
        self._unpacker = zstandard.ZstdDecompressor(max_window_size=MAX_ZSTD_WINDOW_BYTES)
        self._frame = self._unpacker.decompressobj()
        self._is_open = False  # within a frame
        self._ready = bytearray()

    def read(self, size: int) -> bytes:
        """Read up to so many bytes; none at the end."""
        while not self._ready:
            packed = self._file.read(ZSTD_READ_BYTES)
            if not packed and self._is_open:
                raise EOFError("it ends within a frame")
            if not packed:
                return b""
            while packed:
                self._ready += self._frame.decompress(packed)
                self._is_open = not self._frame.eof
                packed = self._frame.unused_data
                if self._frame.eof:
                    self._frame = self._unpacker.decompressobj()
        data = bytes(self._ready[:size])
        del self._ready[:size]
        return data


class _Bounded(io.RawIOBase):
    """Counts what is read, and says in one way what is wrong with it."""

    def __init__(self, stream: BinaryIO, max_bytes: int | None) -> None:
        self._stream = stream
        self._left = max_bytes
        self._max = max_bytes

    def readable(self) -> bool:
        """Say that it can be read."""
        return True

    def readinto(self, buffer: object) -> int:
        """Read into a buffer; 0 at the end."""
        view = memoryview(buffer)  # type: ignore[arg-type]  # the stubs of io know no narrower type
        try:
            data = self._stream.read(len(view))
        except (OSError, EOFError, zlib.error) as error:
            raise _damaged(error) from error
        except Exception as error:  # zstandard's own, whose module is imported only where it is needed
            if type(error).__name__ != "ZstdError":
                raise
            raise _damaged(error) from error
        if self._left is not None:
            self._left -= len(data)
            if self._left < 0:
                raise FileInvalid("FILE_TOO_LARGE", f"Unpacked, the file has more than {self._max:,} bytes.")
        view[: len(data)] = data
        return len(data)


def _damaged(error: Exception) -> FileInvalid:
    return FileInvalid("BROKEN_FILE", f"The packed file is damaged or cut off: {str(error)[:200]}")
