"""PDFs whose glyphs stand exactly where a test wants them, each with the characters that it says it means; Arabic as writers draw it."""

import unicodedata
from collections.abc import Sequence

import arabic_reshaper
from bidi.algorithm import get_display

_WIDTH = 6
_LEFT = 36
_TOP = 800
_LEADING = 20
_KEPT_MARKS = arabic_reshaper.ArabicReshaper({"delete_harakat": False})


def draw_pdf(*pages: Sequence[Sequence[str]]) -> bytes:
    """Make a PDF: per page its lines, per line its glyphs from left to right, per glyph the characters that it stands for."""
    codes = {glyph: number for number, glyph in enumerate(sorted({glyph for page in pages for line in page for glyph in line}), start=1)}
    bodies = ["<< /Type /Catalog /Pages 2 0 R >>", "", *_make_font(codes)]
    kids = []
    for page in pages:
        content = _make_content(page, codes)
        kids.append(f"{len(bodies) + 1} 0 R")
        bodies.append(
            f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 900 842] /Resources << /Font << /F 3 0 R >> >> /Contents {len(bodies) + 2} 0 R >>"
        )
        bodies.append(content)
    bodies[1] = f"<< /Type /Pages /Count {len(kids)} /Kids [{' '.join(kids)}] >>"
    return _write(bodies)


def shape_as_forms(text: str) -> list[str]:
    """Give a line as old writers draw it: presentation forms in visual order."""
    return list(str(get_display(_KEPT_MARKS.reshape(text), base_dir="R")))


def shape_as_letters(text: str) -> list[str]:
    """Give a line as modern writers draw it: glyphs in visual order that mean letters, a ligature all of its own."""
    return [unicodedata.normalize("NFKC", glyph) for glyph in shape_as_forms(text)]


def draw_without_shaping(text: str) -> list[str]:
    """Give a line as writers that know no Arabic draw it: letters in reading order, from the left."""
    return list(text)


def _make_content(page: Sequence[Sequence[str]], codes: dict[str, int]) -> str:
    lines = []
    for number, line in enumerate(page):
        shown = "".join(f"{codes[glyph]:04x}" for glyph in line)
        lines.append(f"BT /F 12 Tf 1 0 0 1 {_LEFT} {_TOP - _LEADING * number} Tm <{shown}> Tj ET")
    return _make_stream("\n".join(lines))


def _make_font(codes: dict[str, int]) -> list[str]:
    """Give the objects 3 to 6: a font without a font file. What its glyphs mean stands in its ToUnicode map."""
    pairs = "\n".join(f"<{code:04x}> <{glyph.encode('utf-16-be').hex()}>" for glyph, code in codes.items())
    meanings = (
        "/CIDInit /ProcSet findresource begin 12 dict begin begincmap /CMapName /M def /CMapType 2 def\n"
        f"1 begincodespacerange <0000> <ffff> endcodespacerange\n{len(codes)} beginbfchar\n{pairs}\nendbfchar\nendcmap end end"
    )
    return [
        "<< /Type /Font /Subtype /Type0 /BaseFont /None /Encoding /Identity-H /DescendantFonts [4 0 R] /ToUnicode 6 0 R >>",
        "<< /Type /Font /Subtype /CIDFontType2 /BaseFont /None /CIDSystemInfo << /Registry (Adobe) /Ordering (Identity) /Supplement 0 >>"
        f" /DW {_WIDTH * 1000 // 12} /FontDescriptor 5 0 R >>",
        "<< /Type /FontDescriptor /FontName /None /Flags 4 /FontBBox [0 0 1000 1000] /ItalicAngle 0 /Ascent 800 /Descent -200"
        " /CapHeight 700 /StemV 80 >>",
        _make_stream(meanings),
    ]


def _make_stream(content: str) -> str:
    return f"<< /Length {len(content)} >>\nstream\n{content}\nendstream"


def _write(bodies: Sequence[str]) -> bytes:
    written = b"%PDF-1.7\n"
    places = []
    for number, body in enumerate(bodies, start=1):
        places.append(len(written))
        written += f"{number} 0 obj\n{body}\nendobj\n".encode("ascii")
    table = "".join(f"{place:010d} 00000 n \n" for place in places)
    end = f"xref\n0 {len(bodies) + 1}\n0000000000 65535 f \n{table}trailer\n<< /Size {len(bodies) + 1} /Root 1 0 R >>\n"
    return written + f"{end}startxref\n{len(written)}\n%%EOF\n".encode("ascii")
