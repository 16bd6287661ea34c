"""Datasets: immutable uploads of training records, with what was found wrong in them."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum


class DatasetFormat(StrEnum):
    """The form of an uploaded file."""

    JSONL = "JSONL"


class RecordKind(StrEnum):
    """What the records are."""

    CHAT = "CHAT"
    COMPLETION = "COMPLETION"
    MIXED = "MIXED"


@dataclass(frozen=True, slots=True)
class Finding:
    """One bad record: its line (from 1), a stable code and a sentence."""

    line: int
    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Dataset:
    """An uploaded dataset. `findings` is a sample of the first ones; `invalid_record_count` counts all."""

    dataset_id: str
    display_name: str
    format: DatasetFormat
    record_kind: RecordKind
    record_count: int
    invalid_record_count: int
    size_bytes: int
    sha256: str
    path: str
    create_time: datetime
    findings: Sequence[Finding] = ()
