"""CSV: each row a paragraph that names its columns, so that a row says what it means wherever it is cut out. Knows no other format."""

import csv
import io
from collections.abc import Sequence

from server.rag.parsing.builder import DocumentBuilder
from server.rag.parsing.document import DocumentInvalid, Fault, Limits, ParsedDocument, Source
from server.rag.parsing.formats import find_delimiter


def parse_csv(source: Source, limits: Limits) -> ParsedDocument:
    """Read a table: `column: value; column: value` per row where the first one names the columns, else the values."""
    csv.field_size_limit(limits.text_characters)
    delimiter = find_delimiter(source.text) or ","
    builder = DocumentBuilder(limits, source.warnings)
    names: list[str] | None = None
    try:
        for row in csv.reader(io.StringIO(source.text.replace("\f", " "), newline=""), delimiter=delimiter):
            cells = [" ".join(cell.split()) for cell in row]
            if names is None:
                names = cells if _is_header(cells) else []
                if names:
                    continue
            builder.add_block(_write_row(names, cells))
    except csv.Error as error:
        raise DocumentInvalid(Fault.DAMAGED, f"The CSV cannot be read: {error}.") from error
    if names and not builder.length:
        builder.add_block("; ".join(names))
    return builder.build()


def _is_header(cells: Sequence[str]) -> bool:
    """Say whether a first row names columns: no cell is empty, a number, or there twice."""
    return all(cell and not _is_number(cell) for cell in cells) and len(set(cells)) == len(cells)


def _is_number(cell: str) -> bool:
    return any(letter.isdigit() for letter in cell) and not any(letter.isalpha() for letter in cell)


def _write_row(names: Sequence[str], cells: Sequence[str]) -> str:
    if not names:
        return "; ".join(cell for cell in cells if cell)
    named = (f"{name}: {cell}" for name, cell in zip(names, cells, strict=False) if cell)
    return "; ".join([*named, *(cell for cell in cells[len(names) :] if cell)])
