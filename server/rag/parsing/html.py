"""HTML by lxml: what a reader sees, block by block, with its headings. Knows nothing of other formats, fetches nothing."""

import re

from lxml import etree

from server.rag.parsing.builder import DocumentBuilder
from server.rag.parsing.document import DocumentInvalid, Fault, Limits, ParsedDocument, Source

_SKIPPED_TAGS = "script style template noscript head nav svg math iframe object select button textarea canvas audio video"
_INLINE_TAGS = (
    "a abbr acronym b bdi bdo big cite code data del dfn em font i ins kbd label mark q rp rt ruby s samp small span strike strong sub sup"
    " time tt u var wbr img"
)
_SKIPPED = frozenset(_SKIPPED_TAGS.split())
_INLINE = frozenset(_INLINE_TAGS.split())
_CELLS = frozenset({"td", "th"})
_HEADING = re.compile(r"h[1-6]")
_BLANKS = re.compile(r"[ \t\n\r\f]+")


def parse_html(source: Source, limits: Limits) -> ParsedDocument:
    """Read HTML. Raises DocumentInvalid where elements are nested too deeply to be read whole."""
    parser = etree.HTMLParser(encoding="utf-8", huge_tree=True, no_network=True, remove_comments=True, remove_pis=True)
    root = etree.fromstring(source.text.encode("utf-8"), parser)
    if any(entry.level_name == "FATAL" for entry in parser.error_log):
        raise DocumentInvalid(Fault.DAMAGED, "The HTML is nested too deeply, or has parts that are too large, to be read whole.")
    builder = DocumentBuilder(limits, source.warnings)
    if root is not None:
        _Reader(builder).read(root)
    title = root.find(".//head/title") if root is not None else None
    return builder.build((title.text or "") if title is not None else "")


class _Reader:
    """Walks a tree without recursion and puts each block on its line."""

    def __init__(self, builder: DocumentBuilder) -> None:
        self._builder = builder
        self._parts: list[str] = []
        self._preformatted = 0
        self._level = 0

    def read(self, root: etree._Element) -> None:
        """Add all that is shown of a tree."""
        walk = etree.iterwalk(root, events=("start", "end"))
        for event, element in walk:
            if event == "start":
                if element.tag in _SKIPPED or element.get("hidden") is not None:
                    walk.skip_subtree()
                else:
                    self._begin(element)
            else:
                if element.tag not in _SKIPPED and element.get("hidden") is None:
                    self._end(element)
                if element is not root:
                    self._add(element.tail)
        self._flush()

    def _begin(self, element: etree._Element) -> None:
        tag = str(element.tag)
        if tag == "br":
            self._parts.append("\n")
        elif tag in _CELLS:
            self._parts.append(" | " if any(part.strip() for part in self._parts) else "")
        elif not _is_inline(element):
            self._flush()
            self._parts += ["- "] if tag == "li" else []
        self._level = int(tag[1]) if _HEADING.fullmatch(tag) else self._level
        self._preformatted += tag == "pre"
        self._add(element.text)

    def _end(self, element: etree._Element) -> None:
        tag = str(element.tag)
        if tag not in _CELLS and tag != "br" and not _is_inline(element):
            self._flush()
        self._level = 0 if _HEADING.fullmatch(tag) else self._level
        self._preformatted -= tag == "pre"

    def _add(self, text: str | None) -> None:
        if text:
            self._parts.append(text.replace("\f", " ") if self._preformatted else _BLANKS.sub(" ", text))

    def _flush(self) -> None:
        """End a block: collapse its blanks as a browser does."""
        text = "".join(self._parts)
        if not self._preformatted:
            text = "\n".join(_BLANKS.sub(" ", line).strip() for line in text.split("\n"))
        text = text.strip("\n")
        self._parts.clear()
        if self._level and text.strip():
            self._builder.add_heading(self._level, text)
        elif text.strip() not in ("", "-"):
            self._builder.add_block(text)


def _is_inline(element: etree._Element) -> bool:
    """Say whether an element goes on with the line: words, the one block of a table's cell (a row is a line), the first of an item."""
    if element.tag in _INLINE:
        return True
    parent = element.getparent()
    if parent is None or element.tag not in ("p", "div"):
        return False
    return (parent.tag in _CELLS and len(parent) == 1) or (parent.tag == "li" and parent[0] is element and not (parent.text or "").strip())
