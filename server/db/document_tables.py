"""The tables of what RAG models search: documents, their chunks, and what stands for a chunk in each kind of search.

`organization` and the model come first in every key: no key can tell of another's rows.
"""

from dataclasses import dataclass
from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    ColumnElement,
    ForeignKeyConstraint,
    Identity,
    Index,
    PrimaryKeyConstraint,
    Table,
    Text,
    UniqueConstraint,
    literal_column,
)
from sqlalchemy.dialects.postgresql import ARRAY

from server.db.columns import HalfVector, SparseVector, identifier, json, metadata, number, size, string, time

# The predicates of partial indexes, as literals: with a bound value a generic plan could not use the index.
HAS_SOURCE = literal_column("source_uri <> ''", Boolean)
HAS_ORIGINAL = literal_column("original_sha256 <> ''", Boolean)


@dataclass(frozen=True, slots=True)
class IndexKey:
    """One index of a model, as the keys of its rows name it."""

    organization: str
    model_id: str
    index_number: int

    @property
    def columns(self) -> dict[str, Any]:
        """The values of the key's columns."""
        return {"organization": self.organization, "model_id": self.model_id, "index_number": self.index_number}

    def rows_of(self, table: Table) -> tuple[ColumnElement[bool], ...]:
        """The conditions that choose this index's rows of a table."""
        return tuple(table.c[name] == value for name, value in self.columns.items())


# How many chunks an index has: term_counts, of the term that stands in every chunk.
rag_indexes = Table(
    "rag_indexes",
    metadata,
    identifier("organization"),
    identifier("model_id"),
    number("index_number"),
    string("state"),
    string("embedding_model"),
    json("chunking"),
    # The first commit fixes these; empty and NULL before.
    string("revision"),
    json("space", nullable=True),
    string("fingerprint"),
    number("dimension", nullable=True),
    json("calibration", nullable=True),
    # Names the table of its own that its vectors may have; NULL: they lie in chunk_vectors.
    Column("index_key", BigInteger, Identity(always=True), nullable=False),
    Column("vector_table", Text),
    time("create_time"),
    PrimaryKeyConstraint("organization", "model_id", "index_number"),
    UniqueConstraint("organization", "index_key", name="rag_indexes_by_key"),
    ForeignKeyConstraint(
        ["organization", "model_id"], ["models.organization", "models.model_id"], name="rag_indexes_of_model", ondelete="CASCADE"
    ),
)

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
    identifier("job_id"),
    # Of the latest content given, and of the one that is stored here; 0: none was indexed.
    number("revision"),
    number("content_revision"),
    # The file that the text was read from; empty: it was given as text.
    string("path"),
    string("format"),
    size("original_size_bytes"),
    string("original_sha256"),
    number("page_count"),
    # What chunks are cut by, besides the text: kept for other indexes.
    json("page_starts"),
    json("headings"),
    json("warnings"),
    string("error_reason"),
    time("update_time", nullable=True),
    PrimaryKeyConstraint("organization", "model_id", "document_id"),
    ForeignKeyConstraint(
        ["organization", "model_id"], ["models.organization", "models.model_id"], name="documents_of_model", ondelete="CASCADE"
    ),
    # Sources may be longer than what an index takes.
    Index("documents_by_source", "organization", "model_id", literal_column("md5(source_uri)"), postgresql_where=HAS_SOURCE),
    Index("documents_by_original", "organization", "model_id", "original_sha256", postgresql_where=HAS_ORIGINAL),
    Index("documents_by_metadata", "metadata", postgresql_using="gin", postgresql_ops={"metadata": "jsonb_path_ops"}),
)


def _of_document(name: str) -> ForeignKeyConstraint:
    return ForeignKeyConstraint(
        ["organization", "model_id", "document_id"],
        ["documents.organization", "documents.model_id", "documents.document_id"],
        name=name,
        ondelete="CASCADE",
    )


# Contents that wait to be indexed: at most one of a document, the latest that was given.
staged_documents = Table(
    "staged_documents",
    metadata,
    identifier("organization"),
    identifier("model_id"),
    identifier("document_id"),
    number("revision"),
    string("title"),
    string("source_uri"),
    json("metadata"),
    # One of the two is empty.
    string("text"),
    string("path"),
    size("size_bytes"),
    string("sha256"),
    PrimaryKeyConstraint("organization", "model_id", "document_id"),
    _of_document("staged_documents_of_document"),
)

# What an index that does not answer yet has of each document, whose own row tells of the index that answers.
reindexed_documents = Table(
    "reindexed_documents",
    metadata,
    identifier("organization"),
    identifier("model_id"),
    number("index_number"),
    identifier("document_id"),
    number("content_revision"),
    number("chunk_count"),
    # Why it has no chunks there; empty: it has.
    string("error"),
    string("error_reason"),
    PrimaryKeyConstraint("organization", "model_id", "index_number", "document_id"),
    ForeignKeyConstraint(
        ["organization", "model_id", "index_number"],
        ["rag_indexes.organization", "rag_indexes.model_id", "rag_indexes.index_number"],
        name="reindexed_documents_of_index",
        ondelete="CASCADE",
    ),
    _of_document("reindexed_documents_of_document"),
    # A document goes with what is noted of it.
    Index("reindexed_documents_by_document", "organization", "model_id", "document_id"),
)

# Chunks are keyed by document first: a document goes with its chunks in every index, found by the beginning of the key.
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
    number("index_number"),
    Column("heading_path", ARRAY(Text), nullable=False),
    # Empty: cut before hashes were kept.
    string("content_hash"),
    PrimaryKeyConstraint("organization", "model_id", "document_id", "index_number", "position"),
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
    number("index_number"),
    PrimaryKeyConstraint("organization", "model_id", "document_id", "index_number", "position"),
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
    number("index_number"),
    PrimaryKeyConstraint("organization", "model_id", "document_id", "index_number", "position"),
    _of_document("chunk_terms_of_document"),
    Index("chunk_terms_by_word", "words", postgresql_using="gin"),
)

# In how many of an index's chunks a term stands; term 0 stands in all of them.
term_counts = Table(
    "term_counts",
    metadata,
    identifier("organization"),
    identifier("model_id"),
    number("term"),
    number("chunk_count"),
    number("index_number"),
    PrimaryKeyConstraint("organization", "model_id", "index_number", "term"),
    ForeignKeyConstraint(
        ["organization", "model_id", "index_number"],
        ["rag_indexes.organization", "rag_indexes.model_id", "rag_indexes.index_number"],
        name="term_counts_of_index",
        ondelete="CASCADE",
    ),
)
