"""Datasets: immutable uploads of training records, with what was found wrong in them."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from server.domain.findings import Finding


class DatasetFormat(StrEnum):
    """The form of an uploaded file."""

    JSONL = "JSONL"
    JSON = "JSON"
    CSV = "CSV"
    PARQUET = "PARQUET"


class Compression(StrEnum):
    """How a file is packed, if it is."""

    GZIP = "GZIP"
    ZSTD = "ZSTD"


class RecordKind(StrEnum):
    """What the records are."""

    CHAT = "CHAT"
    COMPLETION = "COMPLETION"
    MIXED = "MIXED"
    INSTRUCTION = "INSTRUCTION"
    SHAREGPT = "SHAREGPT"
    TEXT = "TEXT"
    PREFERENCE = "PREFERENCE"


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
    finding_counts: Sequence[Finding] = ()
    compression: Compression | None = None
    source_uri: str = ""
