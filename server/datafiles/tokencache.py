"""Tokens kept by content: what the same file gives with the same tokenizer under the same rules is not computed twice.

An entry is one file, written whole or not at all, checked by its hash when it is read; the oldest go when there are too many.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from server.basemodels.rendering import effective_template
from server.datafiles.preparation import Rules
from server.datafiles.tokenizing import Report
from server.datafiles.tokens import TokenizedRecords
from server.domain.orders import DatasetFile
from server.services.codec import Codec

VERSION = 2  # raised whenever the same records would give other tokens or findings
_REPORT = Codec[Report](Report)
_HASH_BYTES = 32
_PARTS = (("ids", np.int32), ("weights", np.float32), ("starts", np.int64), ("lines", np.int32))


class TokenCache:
    """A directory of entries of at most `max_bytes` together."""

    def __init__(self, directory: Path, max_bytes: int) -> None:
        self._directory = directory
        self._max_bytes = max_bytes

    def find(self, key: str) -> tuple[TokenizedRecords, Report] | None:
        """Give what is kept under a key; a damaged entry is removed."""
        path = self._locate(key)
        try:
            data = path.read_bytes()
        except OSError:
            return None
        try:
            found = _unpack(data)
            os.utime(path)  # used now: others are older
        except (ValueError, KeyError, OSError):
            path.unlink(missing_ok=True)
            return None
        return found

    def keep(self, key: str, records: TokenizedRecords, report: Report) -> None:
        """Keep tokens under a key, if there is room on the disk for them: nothing depends on it."""
        path = self._locate(key)
        aside = path.with_name(f"{path.name}.{os.getpid()}.partial")
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            with aside.open("wb") as file:
                _pack(file, records, report)
            os.replace(aside, path)
            self._drop_oldest()
        except OSError:
            aside.unlink(missing_ok=True)

    def _drop_oldest(self) -> None:
        entries = sorted((entry.stat().st_mtime, entry.stat().st_size, entry) for entry in self._directory.glob("*.tokens*"))
        total = sum(size for _, size, _ in entries)
        for _, size, entry in entries:
            if total <= self._max_bytes:
                return
            entry.unlink(missing_ok=True)
            total -= size

    def _locate(self, key: str) -> Path:
        return self._directory / f"{key}.tokens"


def make_key(file: DatasetFile, tokenizer: PreTrainedTokenizerBase, rules: Rules) -> str | None:
    """Name the tokens of a file by all that they follow from; None for a tokenizer that cannot be described."""
    if not tokenizer.is_fast:
        return None
    described = (VERSION, file.sha256, file.format, file.record_kind, rules, effective_template(tokenizer), tokenizer.special_tokens_map)
    digest = hashlib.sha256(repr(described).encode())
    digest.update(tokenizer.backend_tokenizer.to_str().encode())
    return digest.hexdigest()


def _pack(file: Any, records: TokenizedRecords, report: Report) -> None:
    """Write the hash of all that follows, a line that describes the parts, and the parts."""
    arrays = records.to_arrays()
    header = {"sequences_per_record": records.sequences_per_record, "report": _REPORT.to_json(report)}
    header |= {name: len(arrays[name]) for name, _ in _PARTS}
    line = json.dumps(header).encode() + b"\n"
    parts = [arrays[name].tobytes() for name, _ in _PARTS]
    digest = hashlib.sha256(line)
    for part in parts:
        digest.update(part)
    for piece in (digest.digest(), line, *parts):
        file.write(piece)
    file.flush()
    os.fsync(file.fileno())


def _unpack(data: bytes) -> tuple[TokenizedRecords, Report]:
    """Read what `_pack` wrote. Raises ValueError for anything else."""
    view = memoryview(data)
    if hashlib.sha256(view[_HASH_BYTES:]).digest() != data[:_HASH_BYTES]:
        raise ValueError("the entry is damaged")
    place = data.index(b"\n", _HASH_BYTES) + 1
    header = json.loads(data[_HASH_BYTES:place])
    arrays: list[Any] = []
    for name, kind in _PARTS:
        arrays.append(np.frombuffer(view, dtype=kind, count=header[name], offset=place))
        place += arrays[-1].nbytes
    return TokenizedRecords.from_arrays(header["sequences_per_record"], *arrays), _REPORT.from_json(header["report"])
