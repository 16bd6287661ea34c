"""Quotes are found in documents as they were indexed, across chunks and whatever the white space."""

from server.db.database import PostgresDatabase
from server.domain.documents import NewDocument
from server.domain.retrieval_evaluation import Span
from tests.db.samples import ORGANIZATION, add_model, make_rag_model
from tests.services.libraries import cut, index_documents

HARBOUR = "The harbour of Orvale\nwas built in 1884. It has 100% of the ships; a_b. The harbour of Orvale was rebuilt."
LIBRARY = "مكتبة القصر فيها خرائط. The harbour of Orvale is far."


async def find(database: PostgresDatabase, model_id: str, *quotes: tuple[str, str]) -> list[list[Span]]:
    async with database.transaction(ORGANIZATION) as transaction:
        return [list(places) for places in await transaction.documents.find_quotes(model_id, 1, quotes)]


async def test_quotes_are_found_at_their_offsets(database: PostgresDatabase) -> None:
    model = await add_model(database, make_rag_model())
    cuts = [cut(HARBOUR, 30, 40), cut(LIBRARY)]
    harbour, library = await index_documents(database, model, [NewDocument(HARBOUR), NewDocument(LIBRARY)], cuts)
    other = await add_model(database, make_rag_model())
    await index_documents(database, other, [NewDocument(HARBOUR)])
    across = "Orvale was  built in 1884"  # over two cuts, with a line break in the document
    start = HARBOUR.index("Orvale\nwas")
    arabic = LIBRARY.index("القصر")
    places = await find(
        database, model.model_id, (harbour, across), ("", across), ("", "القصر فيها"), ("", "harbour of Orvale"), (library, "1884"),
        ("", "100% of the ships; a_b"), ("", "100_ of"), ("", "a%b"), (harbour, "a.b"),
    )  # fmt: skip
    assert places[0] == [Span(harbour, start, start + len("Orvale\nwas built in 1884"))]
    assert places[1] == []  # no chunk holds it whole
    assert places[2] == [Span(library, arabic, arabic + len("القصر فيها"))]
    assert sorted((span.document_id, span.char_start) for span in places[3]) == sorted(
        [(harbour, 4), (harbour, HARBOUR.rindex("harbour")), (library, LIBRARY.index("harbour"))]
    )
    assert places[4] == []
    assert len(places[5]) == 1
    assert places[6] == places[7] == places[8] == []


async def test_sizes_are_those_of_indexed_documents_of_this_model(database: PostgresDatabase) -> None:
    model = await add_model(database, make_rag_model())
    [document_id] = await index_documents(database, model, [NewDocument(HARBOUR)])
    async with database.transaction(ORGANIZATION) as transaction:
        [pending] = await transaction.documents.insert(model.model_id, [("doc_0000000000000000000000000", NewDocument("x"))])
        sizes = await transaction.documents.read_sizes(model.model_id, [document_id, pending.document_id, "doc_no", "' OR 1=1"])
    assert sizes == {document_id: len(HARBOUR)}
    async with database.transaction("another") as transaction:
        assert await transaction.documents.read_sizes(model.model_id, [document_id]) == {}
        assert await transaction.documents.find_quotes(model.model_id, 1, [(document_id, "harbour"), ("", "harbour")]) == [[], []]
