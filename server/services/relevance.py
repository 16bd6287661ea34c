"""From what a caller calls relevant to places in documents, each checked: what is nowhere could not be found by any search."""

from collections.abc import Sequence

from server.domain.retrieval_evaluation import Relevant, RetrievalQuery, Span
from server.services.ports import Transaction
from server.services.validation import Violations


async def locate_relevant(
    transaction: Transaction,
    found: Violations,
    model_id: str,
    index_number: int,
    queries: Sequence[RetrievalQuery],
    fields: Sequence[str],
) -> list[list[Sequence[Span]]]:
    """Give for each query, for each relevant passage, the places where it stands. `fields` names the queries in what is found bad."""
    every = [(query, place) for query, asked in enumerate(queries) for place in range(len(asked.relevant))]
    relevant = [queries[query].relevant[place] for query, place in every]
    sizes = await transaction.documents.read_sizes(model_id, sorted({each.document_id for each in relevant if each.document_id}))
    quoted = [number for number, each in enumerate(relevant) if each.quote and (not each.document_id or each.document_id in sizes)]
    quotes = [(relevant[number].document_id, relevant[number].quote) for number in quoted]
    places = dict(zip(quoted, await transaction.documents.find_quotes(model_id, index_number, quotes) if quotes else (), strict=True))
    located: list[list[Sequence[Span]]] = [[] for _ in queries]
    for number, ((query, place), each) in enumerate(zip(every, relevant, strict=True)):
        spans = places.get(number, ()) if each.quote else (Span(each.document_id, each.char_start, each.char_end),)
        _check(found, f"{fields[query]}.relevant[{place}]", each, sizes.get(each.document_id), spans)
        located[query].append(spans)
    return located


def _check(found: Violations, field: str, relevant: Relevant, size: int | None, spans: Sequence[Span]) -> None:
    if relevant.document_id and size is None:
        found.add(f"{field}.document_id", f"no document {relevant.document_id[:100]!r} of this model is indexed")
    elif relevant.quote and not spans:
        where = "the document" if relevant.document_id else "a chunk of a document of this model (name the document, if it is cut there)"
        found.add(f"{field}.quote", f"does not stand in {where}")
    elif size is not None and relevant.char_end is not None and relevant.char_end > size:
        found.add(f"{field}.char_end", f"is {relevant.char_end:,}, but the document has {size:,} characters")
