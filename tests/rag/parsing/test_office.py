"""DOCX and PPTX: titles, headings, pages, tables, boxes and notes, made by the libraries that write such files."""

import io
import re
import zipfile
from collections.abc import Callable

import docx
import pptx
import pytest
from docx.oxml import parse_xml
from docx.oxml.ns import nsdecls
from pptx.util import Inches

from server.rag.parsing.document import DocumentInvalid, Fault, Limits, ParsedDocument
from server.rag.parsing.reading import read_document

_W = nsdecls("w")


def read(data: bytes) -> ParsedDocument:
    return read_document(data, Limits())


def save_docx(fill: Callable[[docx.document.Document], object]) -> bytes:
    document = docx.Document()
    fill(document)
    file = io.BytesIO()
    document.save(file)
    return file.getvalue()


def append_xml(document: docx.document.Document, xml: str) -> None:
    document.element.body.insert(len(document.element.body) - 1, parse_xml(xml))


def test_docx_headings_paragraphs_and_tables_come_in_order() -> None:
    def fill(document: docx.document.Document) -> None:
        document.core_properties.title = "تقرير"
        document.add_heading("Report", 0)
        document.add_heading("الفصل الأول", 1)
        document.add_paragraph("فقرة أولى.\tAnd\nmore.")
        table = document.add_table(2, 2)
        for cell, text in zip((cell for row in table.rows for cell in row.cells), ("Name", "Age", "Sara", "30"), strict=True):
            cell.text = text
        table.cell(1, 1).add_table(1, 1).cell(0, 0).text = "inner"
        document.add_heading("Sub", 2)
        document.add_paragraph("Behind the table.")
        document.add_heading("Second", 1)

    document = read(save_docx(fill))
    assert document.title == "تقرير"
    assert document.pages == ()
    assert [line for line in document.text.split("\n") if line] == [
        *("Report", "الفصل الأول", "فقرة أولى.\tAnd", "more.", "Name | Age", "Sara | 30 inner"),
        *("Sub", "Behind the table.", "Second"),
    ]
    paths = [heading.path for heading in document.headings]
    assert paths == [("Report",), ("الفصل الأول",), ("الفصل الأول", "Sub"), ("Second",)]
    for heading in document.headings:
        assert document.text[heading.char_start :].startswith(heading.path[-1])


def test_docx_keeps_what_controls_links_and_insertions_hold_and_drops_what_was_deleted() -> None:
    def fill(document: docx.document.Document) -> None:
        append_xml(document, f"<w:sdt {_W}><w:sdtContent><w:p><w:r><w:t>In a control.</w:t></w:r></w:p></w:sdtContent></w:sdt>")
        run, gone = "<w:r><w:t xml:space='preserve'>{}</w:t></w:r>", "<w:r><w:delText>gone</w:delText></w:r>"
        inserted = f"<w:ins>{run.format(' inserted')}</w:ins><w:del>{gone}</w:del>"
        append_xml(document, f"<w:p {_W}><w:hyperlink>{run.format('Linked')}</w:hyperlink>{inserted}</w:p>")

    assert read(save_docx(fill)).text == "In a control.\nLinked inserted"


def test_docx_text_boxes_are_read_once_behind_their_paragraph() -> None:
    box = "<w:txbxContent><w:p><w:r><w:t>Boxed</w:t></w:r></w:p></w:txbxContent>"
    choice = f'<mc:Choice Requires="wps"><w:drawing>{box}</w:drawing></mc:Choice><mc:Fallback><w:pict>{box}</w:pict></mc:Fallback>'
    namespace = 'xmlns:mc="http://schemas.openxmlformats.org/markup-compatibility/2006"'
    xml = f"<w:p {_W} {namespace}><w:r><w:t>Around</w:t><mc:AlternateContent>{choice}</mc:AlternateContent></w:r></w:p>"
    assert read(save_docx(lambda document: append_xml(document, xml))).text == "Around\nBoxed"


def test_docx_pages_are_those_of_its_last_printing() -> None:
    def fill(document: docx.document.Document) -> None:
        document.add_paragraph("First page.")
        broken = "<w:r><w:t xml:space='preserve'>Begins here, </w:t></w:r><w:r><w:lastRenderedPageBreak/><w:t>ends there.</w:t></w:r>"
        append_xml(document, f"<w:p {_W}>{broken}</w:p>")
        append_xml(
            document,
            f"<w:p {_W}><w:pPr><w:pStyle w:val='Heading1'/></w:pPr><w:r><w:lastRenderedPageBreak/><w:t>Third</w:t></w:r></w:p>",
        )

    document = read(save_docx(fill))
    assert document.text == "First page.\nBegins here, ends there.\n\nThird"
    assert [document.text[page.char_start : page.char_end].strip() for page in document.pages] == [
        "First page.\nBegins here,",
        "ends there.",
        "Third",
    ]
    assert document.headings[0].char_start == document.text.index("Third")
    assert document.find_page(document.text.index("Third")) == 3


def test_docx_styles_inherit_their_level() -> None:
    def fill(document: docx.document.Document) -> None:
        style = document.styles.add_style("Mine", 1)
        style.base_style = document.styles["Heading 2"]
        document.add_heading("Top", 1)
        document.add_paragraph("Own style", style="Mine")

    assert [heading.path for heading in read(save_docx(fill)).headings] == [("Top",), ("Top", "Own style")]


def test_docx_notes_stand_behind_the_text() -> None:
    data = save_docx(lambda document: document.add_paragraph("Body."))
    notes = f"<w:footnotes {_W}><w:footnote w:id='1'><w:p><w:r><w:t>A note.</w:t></w:r></w:p></w:footnote></w:footnotes>"
    kind = "application/vnd.openxmlformats-officedocument.wordprocessingml.footnotes+xml"
    relation = "http://schemas.openxmlformats.org/officeDocument/2006/relationships/footnotes"
    changed = change_part(
        data, "[Content_Types].xml", "</Types>", f'<Override PartName="/word/footnotes.xml" ContentType="{kind}"/></Types>'
    )
    link = f'<Relationship Id="rId99" Type="{relation}" Target="footnotes.xml"/></Relationships>'
    changed = change_part(changed, "word/_rels/document.xml.rels", "</Relationships>", link)
    file = io.BytesIO(changed)
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr("word/footnotes.xml", notes)
    assert read(file.getvalue()).text == "Body.\nA note."


def change_part(data: bytes, name: str, old: str, new: str) -> bytes:
    """Give a copy of an archive with one text in one part replaced."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as target:
        for entry in source.infolist():
            content = source.read(entry)
            target.writestr(
                entry.filename, re.sub(re.escape(old.encode()), lambda _: new.encode(), content) if entry.filename == name else content
            )
    return file.getvalue()


def make_pptx() -> bytes:
    presentation = pptx.Presentation()
    presentation.core_properties.title = "Talk"
    first = presentation.slides.add_slide(presentation.slide_layouts[1])
    assert first.shapes.title is not None
    first.shapes.title.text_frame.text = "العنوان\vالأول"
    first.placeholders[1].text_frame.text = "Point one\nPoint two"
    second = presentation.slides.add_slide(presentation.slide_layouts[6])
    group = second.shapes.add_group_shape()
    group.shapes.add_textbox(0, 0, Inches(1), Inches(1)).text_frame.text = "Grouped"
    table = second.shapes.add_table(1, 2, 0, 0, Inches(2), Inches(1)).table
    table.cell(0, 0).text, table.cell(0, 1).text = "a", "b"
    notes = second.notes_slide.notes_text_frame
    assert notes is not None
    notes.text = "Say this."
    file = io.BytesIO()
    presentation.save(file)
    return file.getvalue()


def test_pptx_slides_are_pages_with_titles_texts_tables_and_notes() -> None:
    document = read(make_pptx())
    assert document.title == "Talk"
    assert [document.text[page.char_start : page.char_end].strip() for page in document.pages] == [
        "العنوان الأول\nPoint one\nPoint two",
        "Grouped\na | b\nSay this.",
    ]
    assert [heading.path for heading in document.headings] == [("العنوان الأول",)]
    assert document.find_page(document.text.index("Grouped")) == 2


def test_too_many_slides_are_refused() -> None:
    with pytest.raises(DocumentInvalid) as refused:
        read_document(make_pptx(), Limits(pages=1))
    assert refused.value.fault is Fault.TOO_MANY_PAGES
