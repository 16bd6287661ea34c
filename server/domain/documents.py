"""Documents of a RAG model: what is given, what was read of it, and what is cited.

A document keeps its id while its content changes. Each content has a revision, from 1: the latest one given waits (it is staged) until a
job has indexed it, and until then the one before is found.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum

from server.domain.jobs import IndexCounters
from server.domain.retrieval import MetadataValue


class DocumentState(StrEnum):
    """Where a document stands; only INDEXED ones are found."""

    PENDING = "PENDING"
    INDEXED = "INDEXED"
    FAILED = "FAILED"


class DocumentFormat(StrEnum):
    """The formats of files that are read."""

    PDF = "PDF"
    DOCX = "DOCX"
    PPTX = "PPTX"
    HTML = "HTML"
    MARKDOWN = "MARKDOWN"
    PLAIN_TEXT = "PLAIN_TEXT"
    CSV = "CSV"
    JSONL = "JSONL"


# Why a document failed, where nothing closer is known; the others are DOCUMENT_ and the parser's word for it, such as DOCUMENT_ENCRYPTED.
DOCUMENT_INVALID = "DOCUMENT_INVALID"


@dataclass(frozen=True, slots=True)
class DocumentFile:
    """A file that lies in the storage: its path relative to MODEL_STORAGE_PATH."""

    path: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class NewDocument:
    """A document as a caller gives it: a text, or a `file`. `document_id` names the document whose content it becomes."""

    text: str = ""
    title: str = ""
    source_uri: str = ""
    metadata: Mapping[str, MetadataValue] = field(default_factory=dict)
    document_id: str = ""
    file: DocumentFile | None = None

    @property
    def size_bytes(self) -> int:
        """The size of the file, or of the text in UTF-8."""
        return self.file.size_bytes if self.file else len(self.text.encode())

    @property
    def sha256(self) -> str:
        """The hash of the file, or of the text in UTF-8, hexadecimal."""
        return self.file.sha256 if self.file else hashlib.sha256(self.text.encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class DocumentWarning:
    """Something that its owner should know of a document that was read all the same."""

    code: str
    message: str


@dataclass(frozen=True, slots=True)
class DocumentHeading:
    """A heading with those above it, its own words last, and the character of the text at which it begins."""

    path: tuple[str, ...]
    char_start: int


@dataclass(frozen=True, slots=True)
class DocumentContent:
    """What was read of a file. Offsets are in code points of `text`; `page_starts` gives each page's first character."""

    text: str
    title: str = ""
    format: DocumentFormat | None = None
    page_starts: Sequence[int] = ()
    headings: Sequence[DocumentHeading] = ()
    warnings: Sequence[DocumentWarning] = ()


@dataclass(frozen=True, slots=True)
class DocumentReading:
    """How a job came to a document's chunks, or why it did not.

    `revision` is that of the content that was read (None: whichever waits), `content` what was read of a file (None: a text, which stays
    as given), `reused` the positions of chunks whose vectors are those that the same chunks had before. `counters`: how far the job is.
    """

    revision: int | None = None
    content: DocumentContent | None = None
    reused: Sequence[int] = ()
    error_reason: str = DOCUMENT_INVALID
    counters: IndexCounters = IndexCounters()


@dataclass(frozen=True, slots=True)
class Document:
    """A stored document; its text is kept beside it and not part of listings.

    Sizes and `content_sha256` are those of its text, `original_…` those of the file that it was read from. `job_id` is the job of its
    latest content; `error` says why that could not be indexed.
    """

    document_id: str
    model_id: str
    title: str
    state: DocumentState
    size_characters: int
    size_bytes: int
    content_sha256: str
    create_time: datetime
    metadata: Mapping[str, MetadataValue] = field(default_factory=dict)
    source_uri: str = ""
    chunk_count: int = 0
    error: str = ""
    error_reason: str = DOCUMENT_INVALID
    job_id: str = ""
    format: DocumentFormat | None = None
    page_count: int = 0
    warnings: Sequence[DocumentWarning] = ()
    update_time: datetime | None = None
    update_pending: bool = False
    original_size_bytes: int = 0
    original_sha256: str = ""
