"""What a parsed document is, what it may cost, and why it may be refused. Knows no format and no process."""

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from server.domain.documents import DocumentFormat


class Fault(StrEnum):
    """Why a document is refused; stable names."""

    EMPTY = "EMPTY"
    TOO_LARGE = "TOO_LARGE"
    TOO_LONG = "TOO_LONG"
    TOO_MANY_PAGES = "TOO_MANY_PAGES"
    TIMED_OUT = "TIMED_OUT"
    OUT_OF_MEMORY = "OUT_OF_MEMORY"
    UNSUPPORTED_FORMAT = "UNSUPPORTED_FORMAT"
    ENCRYPTED = "ENCRYPTED"
    TRUNCATED = "TRUNCATED"
    DAMAGED = "DAMAGED"
    IMAGE_ONLY = "IMAGE_ONLY"
    ARCHIVE_BOMB = "ARCHIVE_BOMB"
    ARCHIVE_UNSAFE = "ARCHIVE_UNSAFE"
    XML_ENTITIES = "XML_ENTITIES"
    BAD_CHARACTERS = "BAD_CHARACTERS"
    UNKNOWN_ENCODING = "UNKNOWN_ENCODING"
    WORD_TOO_LONG = "WORD_TOO_LONG"


class DocumentInvalid(Exception):
    """One document cannot be read: `fault` is the cause, `message` a sentence for its owner."""

    def __init__(self, fault: Fault, message: str) -> None:
        super().__init__(message)
        self.fault = fault
        self.message = message


@dataclass(frozen=True, slots=True)
class Limits:
    """What reading one document may cost. `archive_ratio` is unpacked to packed bytes of a DOCX or PPTX, asked of large ones only."""

    file_bytes: int = 100 << 20
    text_characters: int = 20_000_000
    word_characters: int = 100_000
    pages: int = 5_000
    archive_entries: int = 10_000
    archive_bytes: int = 512 << 20
    archive_ratio: int = 200
    memory_bytes: int = 2 << 30
    seconds: int = 120


@dataclass(frozen=True, slots=True)
class Page:
    """A page, from 1, and where it stands in the text, end exclusive."""

    number: int
    char_start: int
    char_end: int


@dataclass(frozen=True, slots=True)
class Heading:
    """A heading with those above it, its own words last, and where it begins in the text."""

    path: tuple[str, ...]
    char_start: int


@dataclass(frozen=True, slots=True)
class ParseWarning:
    """Something the owner should know of a document that was read all the same: a stable UPPER_SNAKE code and a sentence."""

    code: str
    message: str


@dataclass(frozen=True, slots=True)
class ParsedDocument:
    """A document as it is cited: all offsets are in code points of `text`. `title` is empty where the document states none."""

    title: str
    text: str
    pages: tuple[Page, ...] = ()
    headings: tuple[Heading, ...] = ()
    warnings: tuple[ParseWarning, ...] = ()
    format: DocumentFormat | None = None

    def find_page(self, place: int) -> int | None:
        """Give the number of the page that a character stands on; None in a document without pages."""
        index = bisect_right(self.pages, place, key=lambda page: page.char_start) - 1
        return self.pages[max(index, 0)].number if self.pages else None

    def find_heading_path(self, place: int) -> tuple[str, ...]:
        """Give the path of the last heading that begins at or before a character; empty before the first one."""
        index = bisect_right(self.headings, place, key=lambda heading: heading.char_start) - 1
        return self.headings[index].path if index >= 0 else ()


@dataclass(frozen=True, slots=True)
class Source:
    """A file's content as parsers get it: its bytes, and its text where the format is one of text."""

    data: bytes
    text: str = ""
    warnings: tuple[ParseWarning, ...] = ()


# The port of all formats. Raises DocumentInvalid; any other exception is taken for damage.
Parser = Callable[[Source, Limits], ParsedDocument]
