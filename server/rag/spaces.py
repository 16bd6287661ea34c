"""Which embedding space a model on disk gives: its profile, and the very weights by the hub's commit or the hash of the files. No torch."""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from server.diskfiles import hash_file
from server.domain.rag_indexes import EmbeddingSpace
from server.rag.profiles import EmbeddingProfile

TORCH = "torch-float32"
_COMMIT = re.compile(r"[0-9a-f]{40}")
# What decides about vectors: weights, and how texts become tokens and tokens vectors.
_SUFFIXES = frozenset({".safetensors", ".json", ".txt", ".model", ".onnx", ".xml", ".bin"})

_Hashes = Mapping[str, tuple[int, int, str]]  # by the path within the model: size, time of the last change, hash


def describe_space(profile: EmbeddingProfile, dimension: int, revision: str, backend: str = TORCH) -> EmbeddingSpace:
    """Give the space of a loaded model."""
    return EmbeddingSpace(
        embedding_model=profile.embedding_model,
        revision=revision,
        pooling=profile.pooling.value if profile.pooling else "LIBRARY",
        query_prefix=profile.query_prefix,
        passage_prefix=profile.passage_prefix,
        preparation=profile.preparation.value,
        max_tokens=profile.max_tokens,
        dimension=dimension,
        backend=backend,
    )


def read_revision(directory: Path, cache_path: Path | None = None) -> str:
    """Give the hub's commit of a snapshot, else the hash of all files that vectors depend on.

    With a `cache_path` a file that was hashed before is hashed again only when its size or its time of change is another: a model of
    2 GB takes seconds otherwise, in each process that loads it.
    """
    if directory.parent.name == "snapshots" and _COMMIT.fullmatch(directory.name):
        return directory.name
    known, kept = _read_cache(directory, cache_path), {}
    digest = hashlib.sha256()
    for path in sorted(directory.rglob("*")):
        if path.suffix not in _SUFFIXES or not path.is_file():
            continue
        name, status = path.relative_to(directory).as_posix(), path.stat()
        size, changed, sha256 = known.get(name, (-1, -1, ""))
        if (size, changed) != (status.st_size, status.st_mtime_ns):
            sha256 = hash_file(path)
        kept[name] = (status.st_size, status.st_mtime_ns, sha256)
        digest.update(f"{name}\0{sha256}\0".encode())
    if kept != known:
        _write_cache(directory, cache_path, kept)
    return f"sha256:{digest.hexdigest()}"


def _name_cache(directory: Path, cache_path: Path) -> Path:
    return cache_path / f"{hashlib.sha256(str(directory.resolve()).encode()).hexdigest()[:32]}.json"


def _read_cache(directory: Path, cache_path: Path | None) -> _Hashes:
    """Give what was hashed before; nothing where the cache is missing or damaged."""
    if cache_path is None:
        return {}
    try:
        entries = json.loads(_name_cache(directory, cache_path).read_bytes())
        return {str(name): (int(size), int(changed), str(sha256)) for name, (size, changed, sha256) in entries.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _write_cache(directory: Path, cache_path: Path | None, hashes: _Hashes) -> None:
    """Keep the hashes; without them all is only slower, so that a full disk stops nobody."""
    if cache_path is None:
        return
    target = _name_cache(directory, cache_path)
    aside = target.with_suffix(f".{os.getpid()}.partial")
    with suppress(OSError):
        cache_path.mkdir(parents=True, exist_ok=True)
        aside.write_text(json.dumps(hashes))
        aside.replace(target)
