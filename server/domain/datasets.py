"""Datasets: immutable uploads of training records, with what was found wrong in them."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Literal

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
    RETRIEVAL = "RETRIEVAL"
    PROMPT = "PROMPT"

    @property
    def can_be_learnt(self) -> bool:
        """Whether records of this kind say what a model should answer."""
        return self not in (RecordKind.RETRIEVAL, RecordKind.PROMPT)


@dataclass(frozen=True, slots=True)
class InspectionOrder:
    """Which file to look through. `format` and `record_kind` None: recognised; larger than `max_bytes` unpacked: refused."""

    path: str
    max_bytes: int
    format: DatasetFormat | None = None
    record_kind: RecordKind | None = None


@dataclass(frozen=True, slots=True)
class InspectionProgress:
    """How far an inspection is."""

    records: int
    kind: Literal["progress"] = "progress"


@dataclass(frozen=True, slots=True)
class Inspection:
    """What a file of records holds. `findings` are the first ones, `finding_counts` one per code over all records.

    `error_code` and `error` say why it cannot be used as a whole, or not from some place on.
    """

    format: DatasetFormat
    compression: Compression | None
    record_kind: RecordKind
    record_count: int
    invalid_record_count: int
    findings: Sequence[Finding] = ()
    finding_counts: Sequence[Finding] = ()
    error_code: str = ""
    error: str = ""
    kind: Literal["inspection"] = "inspection"


@dataclass(frozen=True, slots=True)
class Dataset:
    """An uploaded dataset. `findings` is a sample of the first ones; `finding_counts` has each code once, with its count."""

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
