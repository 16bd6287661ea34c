"""Files that may be imported: those below the configured roots, on this machine's disks or in object stores through fsspec, and no others.

A URI is compared with the roots as text before anything is opened; a file on disk again as the file that was opened.
"""

import asyncio
import logging
import os
import re
import stat
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from server.domain.errors import FailedPrecondition, InvalidInput, NotFound, ServiceError, Unavailable
from server.services.ports import SourceFile
from server.storage.objects import open_filesystem

READ_BYTES = 4 << 20
SCHEMES = ("file", "s3", "gs", "hf")
# No wildcards, queries or fragments, and no chains of protocols (`simplecache::http://…`), which fsspec would follow.
_URI = re.compile(r"(file|s3|gs|hf)://([^\x00-\x1f?#*\[\]{}\\]+)")
_CREDENTIAL_ERRORS = ("NoCredentials", "PartialCredentials", "DefaultCredentials", "TokenRetrieval", "RefreshError", "GatedRepo")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ImportRoot:
    """A place below which all files may be imported: a scheme and the parts of a path."""

    scheme: str
    parts: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> "ImportRoot":
        """Read a root: a URI, or a directory's absolute path. Raises ValueError."""
        scheme, parts = _split(f"file://{text}" if text.startswith("/") else text)
        if scheme != "file" and not parts:
            raise ValueError(f"must name at least a bucket or repository, not {text!r}")
        return cls(scheme, parts)

    def holds(self, scheme: str, parts: Sequence[str]) -> bool:
        """Tell whether a path lies below this root."""
        return scheme == self.scheme and len(parts) > len(self.parts) and tuple(parts[: len(self.parts)]) == self.parts


def _split(uri: str) -> tuple[str, tuple[str, ...]]:
    """Take a URI apart. Raises ValueError for one that could mean another place than it shows."""
    match = _URI.fullmatch(uri)
    if match is None or "::" in uri:
        raise ValueError(f"must begin with one of {', '.join(f'{scheme}://' for scheme in SCHEMES)} and name one file, not {uri[:200]!r}")
    scheme, path = match.group(1), match.group(2)
    if (scheme == "file") != path.startswith("/"):
        raise ValueError("must have three slashes and an absolute path after file:" if scheme == "file" else "must name a bucket first")
    parts = tuple(part for part in path.strip("/").split("/"))
    if any(part in ("", ".", "..") for part in parts) and parts != ("",):
        raise ValueError("must not have empty parts, `.` or `..` in its path")
    return scheme, parts if parts != ("",) else ()


class ImportRoots:
    """Opens files below the roots. `options` are fsspec's, by scheme."""

    def __init__(self, roots: Sequence[ImportRoot], options: dict[str, dict[str, Any]] | None = None) -> None:
        self._roots = roots
        self._options = options or {}

    @asynccontextmanager
    async def open(self, uri: str) -> AsyncIterator[SourceFile]:
        """Open a file. Raises FailedPrecondition where nothing may be imported, InvalidInput, NotFound, Unavailable."""
        if not self._roots:
            message = "This server imports no files: its operator has set no DATASET_IMPORT_ROOTS. Upload the file instead."
            raise FailedPrecondition(message, reason="IMPORT_DISABLED")
        try:
            scheme, parts = _split(uri)
        except ValueError as error:
            raise InvalidInput.field("uri", str(error)) from None
        if not any(root.holds(scheme, parts) for root in self._roots):
            raise InvalidInput.field("uri", "is not below a root that this server may import from", "IMPORT_NOT_ALLOWED")
        opening = self._open_local if scheme == "file" else self._open_remote
        file, size = await _call(uri, lambda: opening(scheme, parts))
        try:
            yield SourceFile(size, _read(uri, file))
        finally:
            await asyncio.to_thread(file.close)

    def _open_local(self, _: str, parts: Sequence[str]) -> tuple[BinaryIO, int | None]:
        path = Path("/", *parts)
        # Not blocking: a pipe would wait for ever for a writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            # Where links have led to, of the file that is open: nobody can exchange it any more.
            real = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
            roots = [Path("/", *root.parts).resolve() for root in self._roots if root.scheme == "file"]
            if not any(real.is_relative_to(root) for root in roots):
                raise InvalidInput.field("uri", "leads out of the roots that this server may import from", "IMPORT_NOT_ALLOWED")
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode):
                raise InvalidInput.field("uri", "is not a file")
        except BaseException:
            os.close(descriptor)
            raise
        return os.fdopen(descriptor, "rb"), found.st_size

    def _open_remote(self, scheme: str, parts: Sequence[str]) -> tuple[BinaryIO, int | None]:
        files = open_filesystem(scheme, **self._options.get(scheme, {}))
        path = "/".join(parts)
        info = files.info(path)
        if info.get("type") != "file":
            raise InvalidInput.field("uri", "is not a file")
        # Read once, from the beginning: what was read is not kept.
        return cast("BinaryIO", files.open(path, "rb", block_size=READ_BYTES, cache_type="readahead")), info.get("size")


async def _read(uri: str, file: BinaryIO) -> AsyncIterator[bytes]:
    while piece := await _call(uri, lambda: file.read(READ_BYTES)):
        yield piece


async def _call(uri: str, work: "Callable[[], Any]") -> Any:
    """Do blocking work in a thread; say in our own words what goes wrong there."""
    try:
        return await asyncio.to_thread(work)
    except ServiceError:
        raise
    except Exception as error:  # every provider has its own
        names = _name_causes(error)
        is_missing = isinstance(error, FileNotFoundError | IsADirectoryError | NotADirectoryError)
        # The hub's client calls a gated repository a missing file, and names the true reason as the cause.
        if is_missing and not any(name.startswith("GatedRepo") for name in names):
            raise NotFound.of("file", uri) from None
        logger.warning("an import failed", exc_info=error)
        if isinstance(error, PermissionError) or any(part in name for part in _CREDENTIAL_ERRORS for name in names):
            message = "The server may not read this file: its credentials are missing or not enough."
            raise FailedPrecondition(message, reason="IMPORT_FORBIDDEN") from error
        raise Unavailable("The place that the file lies in cannot be read now.", reason="IMPORT_SOURCE_UNAVAILABLE") from error


def _name_causes(error: BaseException) -> set[str]:
    """Give the names of an error's classes, and of those of what caused it."""
    names: set[str] = set()
    cause: BaseException | None = error
    while cause is not None:
        names |= {kind.__name__ for kind in type(cause).__mro__}
        cause = cause.__cause__ or cause.__context__
    return names
