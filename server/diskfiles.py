"""What a file on the disk must go through to be trusted: hashing in bounded memory, and flushing to the platter."""

import hashlib
import os
from pathlib import Path

HASH_BLOCK_BYTES = 1 << 20


def hash_file(path: Path) -> str:
    """Give the SHA-256 of a file in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(HASH_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def flush(path: Path) -> None:
    """Wait until a file's bytes, or a directory's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
