"""PPTX by python-pptx: a page per slide, its title as a heading, then its texts, tables and notes. Knows nothing of other formats."""

import io
from collections.abc import Iterable, Iterator

import pptx
from pptx.shapes.autoshape import Shape
from pptx.shapes.base import BaseShape
from pptx.shapes.graphfrm import GraphicFrame
from pptx.shapes.group import GroupShape
from pptx.slide import Slide

from server.rag.parsing.archives import check_archive, open_archive
from server.rag.parsing.builder import DocumentBuilder
from server.rag.parsing.document import DocumentInvalid, Fault, Limits, ParsedDocument, Source


def parse_pptx(source: Source, limits: Limits) -> ParsedDocument:
    """Read a PPTX. Raises DocumentInvalid when it has too many slides."""
    with open_archive(source.data) as archive:
        check_archive(archive, limits)
    presentation = pptx.Presentation(io.BytesIO(source.data))
    if len(presentation.slides) > limits.pages:
        count = len(presentation.slides)
        raise DocumentInvalid(Fault.TOO_MANY_PAGES, f"The file has {count:,} slides; {limits.pages:,} are read at most.")
    builder = DocumentBuilder(limits, source.warnings)
    for slide in presentation.slides:
        builder.begin_page()
        _add_slide(builder, slide)
    return builder.build(presentation.core_properties.title)


def _add_slide(builder: DocumentBuilder, slide: Slide) -> None:
    title = slide.shapes.title
    if title is not None:
        builder.add_heading(1, _clean(title.text_frame.text))
    for shape in _flatten(slide.shapes):
        if title is None or shape.shape_id != title.shape_id:
            for block in _read_shape(shape):
                builder.add_block(_clean(block))
    if slide.has_notes_slide and slide.notes_slide.notes_text_frame is not None:
        builder.add_block(_clean(slide.notes_slide.notes_text_frame.text))


def _flatten(shapes: Iterable[BaseShape]) -> Iterator[BaseShape]:
    for shape in shapes:
        if isinstance(shape, GroupShape):
            yield from _flatten(shape.shapes)
        else:
            yield shape


def _read_shape(shape: BaseShape) -> Iterator[str]:
    if isinstance(shape, Shape):
        yield shape.text_frame.text
    elif isinstance(shape, GraphicFrame) and shape.has_table:
        for row in shape.table.rows:
            yield " | ".join(" ".join(cell.text.split()) for cell in row.cells)


def _clean(text: str) -> str:
    """Give line breaks inside paragraphs, which python-pptx writes as vertical tabs, as newlines."""
    return text.replace("\v", "\n").replace("\f", " ")
