"""From a document that waits to its chunks: reads its file in a confined process, cuts the text, finds the chunks that were there before.

What is wrong with one document becomes its error; what is wrong with the storage or the machine is raised.
"""

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from server.domain.documents import DOCUMENT_INVALID, DocumentContent, DocumentHeading, DocumentReading, DocumentWarning
from server.domain.errors import NotFound
from server.domain.ids import CHUNK, new_id
from server.domain.orders import StagedDocument
from server.domain.retrieval import Chunk, Chunking
from server.rag.chunking import PassageTokenizer, cut_text
from server.rag.parsing.document import DocumentInvalid, Heading, Limits, Page, ParsedDocument
from server.rag.parsing.isolation import parse_document


@dataclass(frozen=True, slots=True)
class CutDocument:
    """A document with its chunks, or with the reason why it has none."""

    document_id: str
    chunks: tuple[Chunk, ...]
    reading: DocumentReading
    error: str = ""

    @property
    def new_chunks(self) -> Sequence[Chunk]:
        """The chunks whose vectors are not there yet."""
        reused = set(self.reading.reused)
        return [chunk for chunk in self.chunks if chunk.position not in reused]


@dataclass(frozen=True, slots=True)
class DocumentCutter:
    """Cuts documents for one index. `fetch` gives a stored file's place on this disk; `bytes_per_vector` is what one takes in an event."""

    chunking: Chunking
    tokenizer: PassageTokenizer
    fetch: Callable[[str], Path]
    limits: Limits
    bytes_per_vector: int
    max_event_bytes: int

    def cut(self, document: StagedDocument) -> CutDocument:
        """Read and cut a document. Raises what the storage raises, but for a file that is gone: its document was deleted meanwhile."""
        try:
            parsed = self._read(document)
        except DocumentInvalid as error:
            return _refuse(document, error.message, f"DOCUMENT_{error.fault}")
        except NotFound:
            return _refuse(document, "The document's file is gone.")
        chunks = tuple(self._cut(parsed))
        reused = find_reused(chunks, document.known_chunks)
        content = content_from_parsed(parsed, document.source_uri) if document.path else None
        cut = CutDocument(document.document_id, chunks, DocumentReading(document.revision, content, reused))
        problem = self._find_problem(cut, parsed.text)
        return _refuse(document, problem) if problem else cut

    def _read(self, document: StagedDocument) -> ParsedDocument:
        if document.content is not None:
            return parsed_from_content(document.content)
        if not document.path:
            return ParsedDocument(document.title, document.text)
        return parse_document(self.fetch(document.path), self.limits)

    def _cut(self, parsed: ParsedDocument) -> Iterator[Chunk]:
        headings = [heading.char_start for heading in parsed.headings]
        for position, cut in enumerate(cut_text(parsed.text, self.chunking, self.tokenizer, headings)):
            yield Chunk(
                chunk_id=new_id(CHUNK),
                position=position,
                text=parsed.text[cut.char_start : cut.char_end],
                char_start=cut.char_start,
                char_end=cut.char_end,
                token_count=cut.token_count,
                page=parsed.find_page(cut.char_start),
                heading_path=find_heading_path(parsed, cut.char_start, cut.char_end),
            )

    def _find_problem(self, cut: CutDocument, text: str) -> str:
        """Say why a document cannot be indexed; empty where it can."""
        if not cut.chunks:
            return "The document has no text."
        if "\x00" in text:
            return "The text has a NUL character, which cannot be stored."
        size_bytes = len(text.encode("utf-8", "replace")) if cut.reading.content else 0
        size_bytes += sum(self.bytes_per_vector + len(chunk.text.encode("utf-8", "replace")) for chunk in cut.chunks)
        if size_bytes > self.max_event_bytes:
            return f"The document is too long to be indexed as one ({len(cut.chunks):,} chunks): add it in parts."
        return ""


def find_heading_path(parsed: ParsedDocument, start: int, end: int) -> tuple[str, ...]:
    """Give the headings over a chunk's first words that are no heading: a section's first chunk begins with the section's own heading."""
    path, place = parsed.find_heading_path(start), start
    following = bisect_right(parsed.headings, start, key=lambda heading: heading.char_start)
    if following and parsed.headings[following - 1].char_start == start:
        place = _find_line_end(parsed.text, start + len(path[-1]))
    for heading in parsed.headings[following:]:
        if heading.char_start >= end or parsed.text[place : heading.char_start].strip():
            break
        path, place = heading.path, _find_line_end(parsed.text, heading.char_start + len(heading.path[-1]))
    return path


def _find_line_end(text: str, place: int) -> int:
    end = text.find("\n", place)
    return end if end >= 0 else len(text)


def find_reused(chunks: Sequence[Chunk], known: Sequence[str]) -> list[int]:
    """Give the positions of chunks that the content before had too. One that was there once is reused once."""
    left = Counter(known)
    reused = []
    for chunk in chunks:
        if left[chunk.content_hash] > 0:
            left[chunk.content_hash] -= 1
            reused.append(chunk.position)
    return reused


def content_from_parsed(parsed: ParsedDocument, source_uri: str = "") -> DocumentContent:
    """Give what is stored of a parsed file. Without a title of its own it is called as its source's last part."""
    return DocumentContent(
        text=parsed.text,
        title=parsed.title or PurePosixPath(source_uri).name,
        format=parsed.format,
        page_starts=[page.char_start for page in parsed.pages],
        headings=[DocumentHeading(heading.path, heading.char_start) for heading in parsed.headings],
        warnings=[DocumentWarning(warning.code, warning.message) for warning in parsed.warnings],
    )


def parsed_from_content(content: DocumentContent) -> ParsedDocument:
    """Give back what was parsed, for cutting it in another way."""
    ends = [*content.page_starts[1:], len(content.text)]
    pages = tuple(Page(number, start, end) for number, (start, end) in enumerate(zip(content.page_starts, ends, strict=False), start=1))
    headings = tuple(Heading(heading.path, heading.char_start) for heading in content.headings)
    return ParsedDocument(content.title, content.text, pages, headings, format=content.format)


def _refuse(document: StagedDocument, message: str, reason: str = DOCUMENT_INVALID) -> CutDocument:
    return CutDocument(document.document_id, (), replace(DocumentReading(), revision=document.revision, error_reason=reason), message)
