"""Where quoted texts stand in a model's documents, by the texts of an index's chunks."""

import re
from collections import defaultdict
from collections.abc import Sequence

from sqlalchemy import ColumnElement, select
from sqlalchemy.ext.asyncio import AsyncConnection

from server.db.document_tables import IndexKey, chunks
from server.domain.retrieval_evaluation import Span

DOCUMENTS_AT_ONCE = 20  # whose texts are in memory together


async def find_quotes(connection: AsyncConnection, index: IndexKey, quotes: Sequence[tuple[str, str]]) -> Sequence[Sequence[Span]]:
    """Give the places of each quote (a document's id and a text): across chunks, whatever the white space between its words.

    An empty id finds the text wherever it stands inside one chunk; that reads every chunk of the index.
    """
    mine = index.rows_of(chunks)
    places: list[list[Span]] = [[] for _ in quotes]
    of_document: dict[str, list[int]] = defaultdict(list)
    for number, (document_id, quote) in enumerate(quotes):
        if document_id:
            of_document[document_id].append(number)
            continue
        columns = select(chunks.c.document_id, chunks.c.char_start, chunks.c.text)
        for row in await connection.execute(columns.where(*mine, chunks.c.text.like(_make_like(quote)))):
            places[number] += _find(quote, row.document_id, row.text, row.char_start)
    ids = sorted(of_document)
    for first in range(0, len(ids), DOCUMENTS_AT_ONCE):
        texts = await _read_texts(connection, mine, ids[first : first + DOCUMENTS_AT_ONCE])
        for document_id, text in texts.items():
            for number in of_document[document_id]:
                places[number] += _find(quotes[number][1], document_id, text, 0)
    return [list(dict.fromkeys(found)) for found in places]


async def _read_texts(connection: AsyncConnection, mine: Sequence[ColumnElement[bool]], document_ids: Sequence[str]) -> dict[str, str]:
    """Put documents together from their chunks, at the offsets of the original; what no chunk holds is white space."""
    query = select(chunks.c.document_id, chunks.c.char_start, chunks.c.text).where(*mine, chunks.c.document_id.in_(document_ids))
    parts: dict[str, list[str]] = defaultdict(list)
    ends: dict[str, int] = defaultdict(int)
    for row in await connection.execute(query.order_by(chunks.c.document_id, chunks.c.char_start)):
        end = ends[row.document_id]
        parts[row.document_id] += [" " * (row.char_start - end), row.text[max(0, end - row.char_start) :]]
        ends[row.document_id] = max(end, row.char_start + len(row.text))
    return {document_id: "".join(pieces) for document_id, pieces in parts.items()}


def _find(quote: str, document_id: str, text: str, offset: int) -> list[Span]:
    pattern = r"\s+".join(map(re.escape, quote.split()))
    return [Span(document_id, offset + match.start(), offset + match.end()) for match in re.finditer(pattern, text)]


def _make_like(quote: str) -> str:
    """Make the pattern that every text with the quote matches, and few others."""
    return "%" + "%".join(re.sub(r"([\\%_])", r"\\\1", word) for word in quote.split()) + "%"
