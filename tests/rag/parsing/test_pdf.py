"""PDFs: pages, headings and paragraphs kept; Arabic in reading order however it was drawn."""

import io
from collections.abc import Callable

import pytest
from fpdf import FPDF
from PIL import Image

from server.rag.parsing.document import DocumentInvalid, Fault, Limits, ParsedDocument
from server.rag.parsing.reading import read_document
from tests.rag.parsing.drawn_pdfs import draw_pdf, draw_without_shaping, shape_as_forms, shape_as_letters

ARABIC_LINES = [
    "اللغة العربية لغة جميلة، عدد المدارس 1250 مدرسة في مدينة الرياض.",
    "قال الأستاذ إن النموذج GPT-4o أفضل من Windows 11 Pro بنسبة 12.5% (انظر الصفحة 3).",
    "استعمل machine learning في 2024/05/06 ثم سافر إلى لندن؛ بلا شك!",
    "إن الإسلام والأمم الأخرى والآن كلها ألفاظ فيها لام ألف.",
    "العدد ٢٥ من [المجلة]",
]


def make_pdf() -> FPDF:
    pdf = FPDF()
    pdf.set_font("Helvetica", size=12)
    return pdf


def read(data: bytes) -> ParsedDocument:
    return read_document(data, Limits())


def write(pdf: FPDF) -> bytes:
    return bytes(pdf.output())


def test_pages_title_and_outline_headings_keep_their_places() -> None:
    pdf = make_pdf()
    pdf.set_title("Annual report")
    for name, level in [("Overview", 0), ("History", 1), ("Numbers", 0)]:
        pdf.add_page()
        pdf.multi_cell(0, 8, "First a line of another kind.", new_x="LMARGIN")
        pdf.start_section(name, level)
        pdf.multi_cell(0, 8, f"{name}\nWhat there is to say of it.")
    document = read(write(pdf))
    assert document.title == "Annual report"
    assert [page.number for page in document.pages] == [1, 2, 3]
    assert [heading.path for heading in document.headings] == [("Overview",), ("Overview", "History"), ("Numbers",)]
    for heading, page in zip(document.headings, document.pages, strict=True):
        assert document.text[heading.char_start :].startswith(heading.path[-1])
        assert page.char_start < heading.char_start < page.char_end
    place = document.text.index("History")
    assert document.find_page(place) == 2
    assert document.find_heading_path(place + 10) == ("Overview", "History")
    assert document.find_heading_path(0) == ()


def test_lines_of_a_paragraph_are_joined_and_words_cut_at_line_ends_too() -> None:
    text = (
        "The library was founded in the year 1874 by a society of merchants who wished that books, maps and every\n"
        "kind of newspaper were open to the whole town, and it has been open on each working day since then, with-\n"
        "out a single exception. It moved twice.\n"
        "Opening hours"
    )
    pdf = make_pdf()
    pdf.add_page()
    for line in text.split("\n"):
        pdf.cell(0, 8, line, new_x="LMARGIN", new_y="NEXT")
    lines = read(write(pdf)).text.split("\n")
    assert len(lines) == 2
    assert "every kind of newspaper" in lines[0]
    assert "without a single exception" in lines[0]
    assert lines[1] == "Opening hours"


def test_items_of_a_list_stay_on_lines_of_their_own() -> None:
    items = [f"{number}. An item of the list that goes over nearly the whole width of the page" for number in (1, 2, 3)]
    pdf = make_pdf()
    pdf.add_page()
    for item in items:
        pdf.cell(0, 8, item, new_x="LMARGIN", new_y="NEXT")
    assert read(write(pdf)).text.split("\n") == items


def shape_with_brackets_as_read(text: str) -> list[str]:
    """Give a line as writers draw it that map a mirrored bracket's glyph to the character of the text, not to the one that it shows."""
    return [glyph.translate(str.maketrans("()[]", ")(][")) for glyph in shape_as_letters(text)]


@pytest.mark.parametrize("shape", [shape_as_forms, shape_as_letters, shape_with_brackets_as_read, draw_without_shaping])
def test_arabic_is_read_in_order_and_in_plain_letters_however_it_was_drawn(shape: Callable[[str], list[str]]) -> None:
    # An empty line between them: each stands for itself.
    document = read(draw_pdf([glyphs for line in ARABIC_LINES for glyphs in (shape(line), [])]))
    assert document.text.replace("\n", " ") == " ".join(ARABIC_LINES)
    assert document.warnings == ()


def test_an_arabic_phrase_in_an_english_page_is_read_in_order() -> None:
    line = "The word مدرسة كبيرة means a large school."
    glyphs = shape_as_forms(line)
    # As an English writer lays it out: the phrase alone runs from the right.
    start, end = line.index("م"), line.rindex("ة") + 1
    drawn = [*line[:start], *shape_as_forms(line[start:end]), *line[end:]]
    assert glyphs != drawn
    assert read(draw_pdf([drawn])).text == line


def test_latin_ligatures_bidi_controls_and_zero_width_characters_do_not_reach_the_text() -> None:
    document = read(draw_pdf([["o", "\ufb03", "c", "e"], [*"a\u200bb\u202bc\ufeff"]]))
    assert document.text.split() == ["office", "abc"]


def test_a_pdf_of_images_is_refused_and_one_with_some_is_read_with_a_warning() -> None:
    image = io.BytesIO()
    Image.new("RGB", (64, 64), "black").save(image, "PNG")
    pdf = make_pdf()
    pdf.add_page()
    pdf.image(image, 10, 10, 50)
    with pytest.raises(DocumentInvalid) as refused:
        read(write(pdf))
    assert refused.value.fault is Fault.IMAGE_ONLY
    pdf = make_pdf()
    pdf.add_page()
    pdf.cell(0, 8, "Some words.")
    pdf.add_page()
    pdf.image(image, 10, 10, 50)
    document = read(write(pdf))
    assert [warning.code for warning in document.warnings] == ["PAGES_WITHOUT_TEXT"]
    assert "2" in document.warnings[0].message
    assert [page.number for page in document.pages] == [1, 2]


def test_an_empty_page_is_no_text() -> None:
    pdf = make_pdf()
    pdf.add_page()
    with pytest.raises(DocumentInvalid) as refused:
        read(write(pdf))
    assert refused.value.fault is Fault.EMPTY


def test_glyphs_that_mean_nothing_outside_their_font_are_replaced_with_a_warning() -> None:
    document = read(draw_pdf([[*"ab \ue001\ue002\ue003"]]))
    assert document.text == "ab \ufffd\ufffd\ufffd"
    assert [warning.code for warning in document.warnings] == ["GARBLED_TEXT"]


def test_a_text_that_stays_reversed_is_warned_of() -> None:
    reversed_words = "المدرسة الكبيرة في المدينة القديمة"[::-1]
    document = read(reversed_words.encode())
    assert document.text == reversed_words
    assert [warning.code for warning in document.warnings] == ["REVERSED_ARABIC"]
