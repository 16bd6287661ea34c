"""The tables of what RAG models search: documents, their chunks, and what stands for a chunk in each kind of search.

`organization` and the model come first in every key: no key can tell of another's rows.
"""

from sqlalchemy import BigInteger, Boolean, Column, ForeignKeyConstraint, Index, PrimaryKeyConstraint, Table, literal_column
from sqlalchemy.dialects.postgresql import ARRAY

from server.db.columns import HalfVector, SparseVector, identifier, json, metadata, number, size, string, time

# A partial index's predicate, as a literal: with a bound value a generic plan could not use the index.
IS_PENDING = literal_column("state = 'PENDING'", Boolean)

documents = Table(
    "documents",
    metadata,
    identifier("organization"),
    identifier("model_id"),
    identifier("document_id"),
    string("title"),
    string("source_uri"),
    string("text"),
    json("metadata"),
    string("state"),
    number("size_characters"),
    size("size_bytes"),
    string("content_sha256"),
    number("chunk_count"),
    string("error"),
    time("create_time"),
    PrimaryKeyConstraint("organization", "model_id", "document_id"),
    ForeignKeyConstraint(
        ["organization", "model_id"], ["models.organization", "models.model_id"], name="documents_of_model", ondelete="CASCADE"
    ),
    Index("documents_pending", "organization", "model_id", "document_id", postgresql_where=IS_PENDING),
)


def _of_document(name: str) -> ForeignKeyConstraint:
    return ForeignKeyConstraint(
        ["organization", "model_id", "document_id"],
        ["documents.organization", "documents.model_id", "documents.document_id"],
        name=name,
        ondelete="CASCADE",
    )


chunks = Table(
    "chunks",
    metadata,
    identifier("organization"),
    identifier("model_id"),
    identifier("document_id"),
    number("position"),
    identifier("chunk_id"),
    string("text"),
    number("char_start"),
    number("char_end"),
    number("token_count"),
    number("page", nullable=True),
    PrimaryKeyConstraint("organization", "model_id", "document_id", "position"),
    _of_document("chunks_of_document"),
)

# Apart from the texts, so that an exact scan reads vectors and nothing else.
chunk_vectors = Table(
    "chunk_vectors",
    metadata,
    identifier("organization"),
    identifier("model_id"),
    identifier("document_id"),
    number("position"),
    Column("embedding", HalfVector, nullable=False),
    PrimaryKeyConstraint("organization", "model_id", "document_id", "position"),
    _of_document("chunk_vectors_of_document"),
)

# What the lexical search compares: the words that find a chunk in a large collection, and the weights of all its terms.
chunk_terms = Table(
    "chunk_terms",
    metadata,
    identifier("organization"),
    identifier("model_id"),
    identifier("document_id"),
    number("position"),
    Column("words", ARRAY(BigInteger), nullable=False),
    Column("weights", SparseVector, nullable=False),
    PrimaryKeyConstraint("organization", "model_id", "document_id", "position"),
    _of_document("chunk_terms_of_document"),
    Index("chunk_terms_by_word", "words", postgresql_using="gin"),
)

# In how many of a model's chunks a term stands; term 0 stands in all of them.
term_counts = Table(
    "term_counts",
    metadata,
    identifier("organization"),
    identifier("model_id"),
    number("term"),
    number("chunk_count"),
    PrimaryKeyConstraint("organization", "model_id", "term"),
    ForeignKeyConstraint(
        ["organization", "model_id"], ["models.organization", "models.model_id"], name="term_counts_of_model", ondelete="CASCADE"
    ),
)
