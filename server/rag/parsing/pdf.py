"""PDF by PDFium: text page by page in reading order, headings from the outline. Knows nothing of other formats."""

import ctypes
import re

import pypdfium2 as pdfium
import pypdfium2.raw as pdfium_raw

from server.rag.parsing.arabic import ARABIC_LETTER, join_forms, remove_controls
from server.rag.parsing.builder import DocumentBuilder
from server.rag.parsing.document import DocumentInvalid, Fault, Limits, ParsedDocument, Source
from server.rag.parsing.pdf_lines import Glyph, count_unreadable, join_lines, read_lines, replace_unreadable

_END_MARK = b"%%EOF"
_END_BYTES = 4096  # the mark may be followed by what a transfer added
_MOST_UNREADABLE = 0.05
_SHOWN_PAGES = 10
_Outline = dict[int, list[tuple[int, str]]]


def parse_pdf(source: Source, limits: Limits) -> ParsedDocument:
    """Read a PDF. Raises DocumentInvalid: encrypted, truncated, damaged, without text."""
    if _END_MARK not in source.data[-_END_BYTES:]:
        raise DocumentInvalid(Fault.TRUNCATED, "The PDF has no end: it was cut off while it was written or sent.")
    pdf = _open(source.data)
    if len(pdf) > limits.pages:
        raise DocumentInvalid(Fault.TOO_MANY_PAGES, f"The PDF has {len(pdf):,} pages; {limits.pages:,} are read at most.")
    builder = DocumentBuilder(limits, source.warnings)
    outline = _read_outline(pdf)
    unread: list[int] = []
    silent: list[int] = []
    unreadable = 0
    for index in range(len(pdf)):
        builder.begin_page()
        try:
            text, has_image = _read_page(pdf, index)
        except pdfium.PdfiumError:
            unread.append(index + 1)
            continue
        if has_image and not text:
            silent.append(index + 1)
        unreadable += count_unreadable(text)
        _add_page(builder, replace_unreadable(text), outline.get(index, []))
    _check_pages(builder, unread, silent, unreadable)
    return builder.build(_read_title(pdf))


def _open(data: bytes) -> pdfium.PdfDocument:
    try:
        return pdfium.PdfDocument(data)
    except pdfium.PdfiumError as error:
        if error.err_code in (pdfium_raw.FPDF_ERR_PASSWORD, pdfium_raw.FPDF_ERR_SECURITY):
            raise DocumentInvalid(Fault.ENCRYPTED, "The PDF is encrypted: save it without its password.") from error
        raise DocumentInvalid(Fault.DAMAGED, "The PDF is damaged: its structure cannot be read.") from error


def _read_page(pdf: pdfium.PdfDocument, index: int) -> tuple[str, bool]:
    """Give a page's text, and where it has none, whether it has an image."""
    page = pdf[index]
    try:
        textpage = page.get_textpage()
        text = textpage.get_text_range()
        lines = read_lines(_read_glyphs(textpage)) if ARABIC_LETTER.search(text) else remove_controls(join_forms(text)).splitlines()
        textpage.close()
        joined = join_lines(lines)
        return joined, not joined and any(True for _ in page.get_objects([pdfium_raw.FPDF_PAGEOBJ_IMAGE], max_depth=3))
    finally:
        page.close()


def _read_glyphs(textpage: pdfium.PdfTextPage) -> list[Glyph]:
    x, y = ctypes.c_double(), ctypes.c_double()
    glyphs = []
    for index in range(textpage.count_chars()):
        pdfium_raw.FPDFText_GetCharOrigin(textpage, index, x, y)
        code = pdfium_raw.FPDFText_GetUnicode(textpage, index)
        glyphs.append(Glyph(chr(code) if code <= 0x10FFFF else "\ufffd", x.value, y.value))
    return glyphs


def _read_outline(pdf: pdfium.PdfDocument) -> _Outline:
    """Give the outline's entries by the page that they lead to: level from 1, and title."""
    outline: _Outline = {}
    for bookmark in pdf.get_toc():
        target = bookmark.get_dest()
        page = target.get_index() if target is not None else None
        title = _clean(bookmark.get_title())
        if page is not None and title:
            outline.setdefault(page, []).append((bookmark.level + 1, title))
    return outline


def _add_page(builder: DocumentBuilder, text: str, entries: list[tuple[int, str]]) -> None:
    """Add a page's text; each heading stands where its words do, else where the one before it does."""
    gap = 1 if builder.length and text else 0
    start = builder.length + gap
    builder.add_block(text)
    place = 0
    for level, title in entries:
        found = re.search(r"\s+".join(re.escape(word) for word in title.split()), text[place:], re.IGNORECASE)
        place += found.start() if found else 0
        builder.mark_heading(level, title, start + place)


def _check_pages(builder: DocumentBuilder, unread: list[int], silent: list[int], unreadable: int) -> None:
    if not builder.length and unread:
        raise DocumentInvalid(Fault.DAMAGED, "No page of the PDF can be read.")
    if not builder.length and silent:
        raise DocumentInvalid(Fault.IMAGE_ONLY, "The PDF holds images of text, no text: run OCR on it first.")
    if unread:
        builder.warn("PAGES_UNREADABLE", f"Damaged pages were left out: {_show(unread)}.")
    if silent:
        builder.warn("PAGES_WITHOUT_TEXT", f"Pages that hold images but no text were left out: {_show(silent)}.")
    if unreadable > _MOST_UNREADABLE * builder.length:
        builder.warn("GARBLED_TEXT", f"{unreadable:,} characters have no meaning outside the PDF's fonts: check the text, or run OCR.")


def _show(pages: list[int]) -> str:
    more = len(pages) - _SHOWN_PAGES
    return ", ".join(map(str, pages[:_SHOWN_PAGES])) + (f" and {more} more" if more > 0 else "")


def _read_title(pdf: pdfium.PdfDocument) -> str:
    return _clean(pdf.get_metadata_value("Title"))


def _clean(text: str) -> str:
    return replace_unreadable(" ".join(remove_controls(join_forms(text)).split()))
