"""DOCX: paragraphs, tables, text boxes and notes in reading order, by python-docx and lxml. Knows nothing of other formats."""

import io
from collections.abc import Iterator, Mapping

import docx
from docx.document import Document
from docx.oxml import parse_xml
from lxml import etree

from server.rag.parsing.archives import check_archive, open_archive
from server.rag.parsing.builder import PAGE_BREAK, DocumentBuilder
from server.rag.parsing.document import Limits, ParsedDocument, Source

_W = "{http://schemas.openxmlformats.org/wordprocessingml/2006/main}"
_MC = "{http://schemas.openxmlformats.org/markup-compatibility/2006}"
_MATH_TEXT = "{http://schemas.openxmlformats.org/officeDocument/2006/math}t"
# What was deleted or moved away, what another branch says again, and text boxes, which are blocks of their own.
_SKIPPED = frozenset({f"{_W}{name}" for name in ("del", "moveFrom", "drawing", "pict", "object", "pPr", "rPr")} | {f"{_MC}Fallback"})
_LETTERS = {f"{_W}tab": "\t", f"{_W}cr": "\n", f"{_W}noBreakHyphen": "-", f"{_W}lastRenderedPageBreak": PAGE_BREAK}
_CONTAINERS = frozenset(f"{_W}{name}" for name in ("sdt", "sdtContent", "customXml", "ins", "moveTo", "smartTag"))
_NOTES = ("/footnotes", "/endnotes")
_BODY_TEXT = 9  # the outline level of what is no heading
_MOST_BASED_ON = 20


def parse_docx(source: Source, limits: Limits) -> ParsedDocument:
    """Read a DOCX. Pages are those of its last printing by Word, where it has them."""
    with open_archive(source.data) as archive:
        check_archive(archive, limits)
    document = docx.Document(io.BytesIO(source.data))
    builder = DocumentBuilder(limits, source.warnings)
    body = document.element.body
    if next(body.iter(f"{_W}lastRenderedPageBreak"), None) is not None:
        builder.begin_page()
    levels = _read_levels(document)
    for block in _find_blocks(body):
        _add_block(builder, block, levels)
    _add_notes(builder, document)
    return builder.build(document.core_properties.title or "")


def _find_blocks(container: etree._Element) -> Iterator[etree._Element]:
    """Give paragraphs and tables in order, and behind each paragraph those of its text boxes."""
    for child in container:
        if child.tag == f"{_W}p":
            yield child
            for box in child.iter(f"{_W}txbxContent"):
                if not any(above.tag == f"{_MC}Fallback" for above in box.iterancestors()):
                    yield from _find_blocks(box)
        elif child.tag == f"{_W}tbl":
            yield child
        elif child.tag in _CONTAINERS:
            yield from _find_blocks(child)


def _add_block(builder: DocumentBuilder, block: etree._Element, levels: Mapping[str, int]) -> None:
    if block.tag == f"{_W}tbl":
        for row in block.iterchildren(f"{_W}tr"):
            builder.add_block(" | ".join(_read_cell(cell) for cell in row.iter(f"{_W}tc") if _is_of(cell, row)))
        return
    level = _find_level(block, levels)
    text = "".join(_read_text(block))
    if level:
        builder.add_heading(level, text)
    else:
        builder.add_block(text)


def _is_of(cell: etree._Element, row: etree._Element) -> bool:
    """Say whether a cell is this row's own, not one of a table in a cell."""
    return next(cell.iterancestors(f"{_W}tr")) is row


def _read_cell(cell: etree._Element) -> str:
    """Give a cell's words on one line, those of tables inside it too."""
    return " ".join(" ".join("".join(_read_text(paragraph)) for paragraph in cell.iter(f"{_W}p")).replace(PAGE_BREAK, " ").split())


def _read_text(element: etree._Element) -> Iterator[str]:
    for child in element:
        if child.tag in (f"{_W}t", _MATH_TEXT):
            yield (child.text or "").replace(PAGE_BREAK, " ")
        elif child.tag == f"{_W}br":
            yield "" if child.get(f"{_W}type") == "page" else "\n"
        elif child.tag in _LETTERS:
            yield _LETTERS[child.tag]
        elif child.tag not in _SKIPPED:
            yield from _read_text(child)


def _find_level(paragraph: etree._Element, levels: Mapping[str, int]) -> int:
    """Give a paragraph's heading level from 1, 0 where it is none."""
    own = paragraph.find(f"{_W}pPr/{_W}outlineLvl")
    if own is not None:
        return _to_level(own)
    style = paragraph.find(f"{_W}pPr/{_W}pStyle")
    return levels.get(style.get(f"{_W}val") or "", 0) if style is not None else 0


def _read_levels(document: Document) -> dict[str, int]:
    """Give the heading level of each style that has one, by its id; styles inherit it."""
    styles = {style.get(f"{_W}styleId") or "": style for style in document.styles.element.iterchildren(f"{_W}style")}
    levels = {}
    for name, style in styles.items():
        current: etree._Element | None = style
        for _ in range(_MOST_BASED_ON):
            if current is None:
                break
            own = current.find(f"{_W}pPr/{_W}outlineLvl")
            if own is not None:
                levels[name] = _to_level(own)
                break
            if _is_title(current):
                levels[name] = 1
                break
            base = current.find(f"{_W}basedOn")
            current = styles.get(base.get(f"{_W}val") or "") if base is not None else None
    return levels


def _is_title(style: etree._Element) -> bool:
    name = style.find(f"{_W}name")
    return name is not None and (name.get(f"{_W}val") or "").lower() == "title"


def _to_level(outline: etree._Element) -> int:
    value = outline.get(f"{_W}val") or ""
    return int(value) + 1 if value.isdecimal() and int(value) < _BODY_TEXT else 0


def _add_notes(builder: DocumentBuilder, document: Document) -> None:
    """Add foot- and endnotes behind the text."""
    for relation in document.part.rels.values():
        if not relation.is_external and relation.reltype.endswith(_NOTES):
            for note in parse_xml(relation.target_part.blob):
                for paragraph in note.iter(f"{_W}p"):
                    builder.add_block("".join(_read_text(paragraph)).replace(PAGE_BREAK, ""))
