"""Remote storage as whole objects under keys, through fsspec: S3 and Google Cloud Storage. Knows nothing of what they mean.

Credentials come from where each provider's own tools take them (environment, files, the machine's role).
"""

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, cast
from uuid import uuid4

from server.domain.errors import Unavailable

_logger = logging.getLogger(__name__)

_READ_BYTES = 1 << 20
_BLOCK_BYTES = 16 << 20  # asked for at a time: a download holds no more
# Of a provider's error: what its name says about the cause, and what a person is told.
_CREDENTIAL_ERRORS = ("NoCredentials", "PartialCredentials", "DefaultCredentials", "TokenRetrieval", "RefreshError")
_OPTIONS: dict[str, dict[str, Any]] = {
    # Ten tries over about a minute, then the caller is told.
    "s3": {"config_kwargs": {"connect_timeout": 10, "read_timeout": 60, "retries": {"max_attempts": 5, "mode": "standard"}}},
    "gs": {},
}


class StorageUnavailable(Unavailable):
    """The remote storage cannot be used now, or not with these credentials. The message names the bucket, never a secret."""

    default_reason = "STORAGE_UNAVAILABLE"


def open_filesystem(scheme: str, **options: Any) -> Any:
    """Give a provider's files through fsspec, afresh: what a listing showed a moment ago means nothing where others write too."""
    # gcsfs would ask the bucket's kind over gRPC before each call, with the application's default credentials or none.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    # A late import: the providers' clients take a second, and most installations keep their files on a disk.
    import fsspec

    return fsspec.filesystem(scheme, use_listings_cache=False, skip_instance_cache=True, **options)


@dataclass(frozen=True, slots=True)
class StoredObject:
    """An object as a listing shows it. `modified` in seconds since 1970."""

    key: str
    size_bytes: int
    modified: float


class RemoteObjects:
    """The objects below one URL, `s3://bucket/prefix`. Blocking. Raises StorageUnavailable; FileNotFoundError for a missing key."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._root = self.url.partition("://")[2]

    @cached_property
    def _files(self) -> Any:
        scheme = self.url.partition("://")[0]
        return open_filesystem(scheme, **_OPTIONS[scheme])

    def check(self) -> None:
        """Write and remove a small object: a start with a wrong bucket or wrong credentials ends here. Raises StorageUnavailable."""
        key = f".write-check-{uuid4().hex}"
        try:
            with self._explained():
                self._files.pipe_file(self._locate(key), b"ok")
            self.delete([key])
        except FileNotFoundError as error:
            raise StorageUnavailable(f"The storage {self.url} does not exist: make the bucket first.") from error

    def upload(self, source: Path, key: str) -> None:
        """Copy a file; the object appears whole or not at all (the providers' promise, for uploads in parts too)."""
        with self._explained():
            self._files.put_file(str(source), self._locate(key))

    def download(self, key: str, target: Path) -> None:
        """Copy an object into a file."""
        with self._explained(), self._open(key) as remote, target.open("wb") as file:
            while piece := remote.read(_READ_BYTES):
                file.write(piece)

    def read(self, key: str) -> bytes:
        """Read a small object whole."""
        with self._explained():
            return cast(bytes, self._files.cat_file(self._locate(key)))

    def list(self, prefix: str = "") -> list[StoredObject]:
        """List every object at or below the directory `prefix`."""
        try:
            with self._explained():
                found = self._files.find(self._locate(prefix) if prefix else self._root, detail=True)
        except FileNotFoundError:
            return []
        start = f"{self._root}/"
        return [StoredObject(name.removeprefix(start), int(entry["size"] or 0), _modified(entry)) for name, entry in found.items()]

    def delete(self, keys: Sequence[str]) -> None:
        """Remove objects in the order given; missing ones are fine."""
        with self._explained():
            for key in keys:
                with suppress(FileNotFoundError):
                    self._files.rm_file(self._locate(key))

    def delete_tree(self, path: str, first: str = "") -> None:
        """Remove the object at `path` and all below it; that named `first` before all others."""
        keys = [entry.key for entry in self.list(path)]
        self.delete(sorted({path, *keys}, key=lambda key: (key != f"{path}/{first}", key)))

    def _open(self, key: str) -> BinaryIO:
        return cast(BinaryIO, self._files.open(self._locate(key), "rb", cache_type="readahead", block_size=_BLOCK_BYTES))

    def _locate(self, key: str) -> str:
        return f"{self._root}/{key}"

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn whatever a provider's client raises into StorageUnavailable; a missing key stays FileNotFoundError."""
        try:
            yield
        except (FileNotFoundError, StorageUnavailable):
            raise
        except Exception as error:
            _logger.warning("the storage %s failed: %s: %s", self.url, type(error).__name__, error)
            raise StorageUnavailable(f"The storage {self.url} {_explain(error)}.") from error


def _explain(error: Exception) -> str:
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(cause)
    names = [type(each).__name__ for each in chain]
    if any(name.startswith(_CREDENTIAL_ERRORS) for name in names):
        return "cannot be used: this server has no credentials for it (for S3: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY)"
    if isinstance(error, PermissionError):
        return "refuses this server's credentials"
    return "cannot be reached"


def _modified(entry: dict[str, Any]) -> float:
    stamp = entry.get("LastModified") or entry.get("mtime") or entry.get("updated")
    if isinstance(stamp, str):
        stamp = datetime.fromisoformat(stamp)
    return stamp.timestamp() if isinstance(stamp, datetime) else 0.0
