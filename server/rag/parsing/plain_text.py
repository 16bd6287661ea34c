"""Plain text: kept as it is. Knows nothing of other formats."""

from server.rag.parsing.builder import DocumentBuilder
from server.rag.parsing.document import Limits, ParsedDocument, Source


def parse_plain_text(source: Source, limits: Limits) -> ParsedDocument:
    """Take a text as it is, without a title; form feeds, where it has them, begin pages."""
    builder = DocumentBuilder(limits, source.warnings)
    if "\f" in source.text:
        builder.begin_page()
    builder.add_block(source.text)
    return builder.build()
