"""Puts a document's text together from blocks, and keeps the places of its pages and headings. Knows no format."""

from collections.abc import Sequence

from server.rag.parsing.document import DocumentInvalid, Fault, Heading, Limits, Page, ParsedDocument, ParseWarning

# Stands in a block where a new page begins; never part of the text.
PAGE_BREAK = "\f"
_MAX_LEVELS = 9


class DocumentBuilder:
    """Collects one document. Blocks are put on lines of their own, headings behind an empty line."""

    def __init__(self, limits: Limits, warnings: Sequence[ParseWarning] = ()) -> None:
        self._limits = limits
        self._parts: list[str] = []
        self._length = 0
        self._page_starts: list[int] = []
        self._headings: list[Heading] = []
        self._open: list[tuple[int, str]] = []
        self._warnings = list(warnings)

    def begin_page(self) -> None:
        """Begin the next page, from 1, at the next block. Raises DocumentInvalid when there are too many."""
        if len(self._page_starts) >= self._limits.pages:
            raise DocumentInvalid(Fault.TOO_MANY_PAGES, f"The document has more than {self._limits.pages:,} pages.")
        self._page_starts.append(self._length)

    def add_block(self, text: str) -> None:
        """Add a paragraph, which may have lines and page breaks; one without text adds only its page breaks."""
        self._add(text, "\n")

    def add_heading(self, level: int, text: str) -> None:
        """Add a heading of level 1 (highest) to 9, on one line."""
        words = " ".join(text.replace(PAGE_BREAK, " ").split())
        for _ in range(text.count(PAGE_BREAK)):
            self.begin_page()
        if words:
            start = self._add(words, "\n\n")
            self._headings.append(self._nest(level, words, start))

    def mark_heading(self, level: int, words: str, char_start: int) -> None:
        """Note a heading that is in the text already; to be called in the order of their places."""
        self._headings.append(self._nest(level, words, char_start))

    def warn(self, code: str, message: str) -> None:
        """Add a warning."""
        self._warnings.append(ParseWarning(code, message))

    @property
    def length(self) -> int:
        """The characters so far."""
        return self._length

    def build(self, title: str = "") -> ParsedDocument:
        """Give the document; without a title of its own the first heading is it."""
        ends = [*self._page_starts[1:], self._length]
        pages = tuple(Page(number, start, end) for number, (start, end) in enumerate(zip(self._page_starts, ends, strict=False), start=1))
        named = " ".join(title.split()) or (self._headings[0].path[-1] if self._headings else "")
        return ParsedDocument(named, "".join(self._parts), pages, tuple(self._headings), tuple(self._warnings))

    def _add(self, text: str, separator: str) -> int:
        """Add text behind a separator; return where it begins. A page's span begins with the separator of its first block."""
        start = -1
        for index, piece in enumerate(text.split(PAGE_BREAK)):
            if index:
                self.begin_page()
            if not piece.strip():
                continue
            if start < 0:
                self._append(separator if self._length else "")
                start = self._length
            self._append(piece)
        return start

    def _append(self, text: str) -> None:
        self._length += len(text)
        if self._length > self._limits.text_characters:
            raise DocumentInvalid(Fault.TOO_LONG, f"The document has more than {self._limits.text_characters:,} characters of text.")
        self._parts.append(text)

    def _nest(self, level: int, words: str, char_start: int) -> Heading:
        level = min(max(level, 1), _MAX_LEVELS)
        while self._open and self._open[-1][0] >= level:
            self._open.pop()
        self._open.append((level, words))
        return Heading(tuple(name for _, name in self._open), char_start)
