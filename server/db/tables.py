"""The tables as queries name them; migrations/ makes them, and a test holds the two equal.

`organization` comes first in every key: no key can tell of another organization's rows. Ids sort by bytes ("C"), as they were made to.
"""

from collections.abc import Callable
from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    DateTime,
    Double,
    ForeignKeyConstraint,
    Index,
    Integer,
    MetaData,
    PrimaryKeyConstraint,
    Table,
    Text,
    UniqueConstraint,
    literal_column,
    text,
)
from sqlalchemy.dialects.postgresql import ARRAY, JSONB
from sqlalchemy.types import UserDefinedType

from server.domain.jobs import HELD_STATES, TERMINAL_STATES

metadata = MetaData()

# The predicates of partial indexes. Queries use these very clauses, as literals: with a bound value a generic plan could not use the index.
IS_QUEUED = literal_column("state = 'QUEUED'", Boolean)
IS_HELD = literal_column(f"state IN ({', '.join(repr(state.value) for state in sorted(HELD_STATES))})", Boolean)
IS_ACTIVE = literal_column(f"state NOT IN ({', '.join(repr(state.value) for state in sorted(TERMINAL_STATES))})", Boolean)
IS_STATE_EVENT = literal_column("kind = 'state_changed'", Boolean)
IS_PENDING = literal_column("state = 'PENDING'", Boolean)

_ID = Text(collation="C")
_TIME = DateTime(timezone=True)


class HalfVector(UserDefinedType[str]):
    """pgvector's halfvec: float16 numbers, here without a fixed dimension. Values travel as text: `[0.5,-0.25]`."""

    cache_ok = True

    def get_col_spec(self, **_: object) -> str:
        """Name the type in SQL."""
        return "halfvec"

    def bind_processor(self, dialect: object) -> Callable[[Any], Any] | None:
        """Send texts as they are."""
        return None


class SparseVector(UserDefinedType[str]):
    """pgvector's sparsevec: float32 numbers by their places. Values travel as text: `{1:0.5,7:-0.25}/10`."""

    cache_ok = True

    def get_col_spec(self, **_: object) -> str:
        """Name the type in SQL."""
        return "sparsevec"

    def bind_processor(self, dialect: object) -> Callable[[Any], Any] | None:
        """Send texts as they are."""
        return None


def _id(name: str, *, nullable: bool = False) -> Column[str]:
    return Column(name, _ID, nullable=nullable)


def _text(name: str) -> Column[str]:
    return Column(name, Text, nullable=False)


def _number(name: str, *, nullable: bool = False) -> Column[int]:
    return Column(name, Integer, nullable=nullable)


def _size(name: str) -> Column[int]:
    return Column(name, BigInteger, nullable=False)


def _json(name: str, *, nullable: bool = False) -> Column[Any]:
    return Column(name, JSONB(none_as_null=True), nullable=nullable)


def _time(name: str, *, nullable: bool = False) -> Column[Any]:
    return Column(name, _TIME, nullable=nullable)


models = Table(
    "models",
    metadata,
    _id("organization"),
    _id("model_id"),
    _text("type"),
    _text("display_name"),
    _text("description"),
    _json("labels"),
    _text("state"),
    _id("base_model"),
    _text("technique"),
    _number("serving_version", nullable=True),
    _json("rag", nullable=True),
    # Of `rag`, where the generator is a model of ours: the foreign key keeps it from being deleted in the meantime.
    _id("generator_model_id", nullable=True),
    # The first indexed document fixes it, while others may be saving `rag`: a column of its own.
    _number("embedding_dimension", nullable=True),
    _json("error", nullable=True),
    _time("create_time"),
    _time("update_time"),
    # The number of the latest version that was ever made.
    _number("last_version"),
    PrimaryKeyConstraint("organization", "model_id"),
    ForeignKeyConstraint(["organization", "generator_model_id"], ["models.organization", "models.model_id"], name="models_generator"),
    Index("models_by_type", "organization", "type", "model_id"),
    Index("models_by_state", "organization", "state", "model_id"),
    Index("models_by_base_model", "organization", "base_model", "model_id"),
    Index("models_by_generator", "organization", "generator_model_id", postgresql_where=text("generator_model_id IS NOT NULL")),
)

model_versions = Table(
    "model_versions",
    metadata,
    _id("organization"),
    _id("model_id"),
    _number("version"),
    _id("job_id"),
    _text("base_model"),
    _text("base_revision"),
    _text("artifact_path"),
    _text("manifest_sha256"),
    _size("size_bytes"),
    _json("metrics"),
    _time("create_time"),
    _number("attempt"),
    _number("checkpoint_step"),
    _json("spec", nullable=True),
    _json("library_versions"),
    _text("template_sha256"),
    PrimaryKeyConstraint("organization", "model_id", "version"),
    UniqueConstraint("organization", "job_id", name="model_versions_of_job"),
    ForeignKeyConstraint(
        ["organization", "model_id"], ["models.organization", "models.model_id"], name="model_versions_of_model", ondelete="CASCADE"
    ),
)

model_exports = Table(
    "model_exports",
    metadata,
    _id("organization"),
    _id("model_id"),
    _number("version"),
    _text("format"),
    _id("job_id"),
    _text("artifact_path"),
    _text("manifest_sha256"),
    _size("size_bytes"),
    _json("metrics"),
    _time("create_time"),
    PrimaryKeyConstraint("organization", "model_id", "version", "format"),
    ForeignKeyConstraint(
        ["organization", "model_id", "version"],
        ["model_versions.organization", "model_versions.model_id", "model_versions.version"],
        name="model_exports_of_version",
        ondelete="CASCADE",
    ),
)

datasets = Table(
    "datasets",
    metadata,
    _id("organization"),
    _id("dataset_id"),
    _text("display_name"),
    _text("format"),
    _text("record_kind"),
    _size("record_count"),
    _size("invalid_record_count"),
    _size("size_bytes"),
    _text("sha256"),
    _text("path"),
    _json("findings"),
    _time("create_time"),
    _json("finding_counts"),
    Column("compression", Text),
    _text("source_uri"),
    PrimaryKeyConstraint("organization", "dataset_id"),
)


def _of_dataset(column: str) -> ForeignKeyConstraint:
    # A finished job outlives its dataset: its spec still tells the id and the hash.
    return ForeignKeyConstraint(
        ["organization", column], ["datasets.organization", "datasets.dataset_id"], name=f"jobs_{column}", ondelete=f"SET NULL ({column})"
    )


jobs = Table(
    "jobs",
    metadata,
    _id("organization"),
    _id("job_id"),
    _text("kind"),
    _id("model_id"),
    _text("state"),
    _text("state_reason"),
    _json("spec"),
    # Copies out of `spec`, for keys and indexes.
    _id("base_model", nullable=True),
    _id("dataset_id", nullable=True),
    _id("eval_dataset_id", nullable=True),
    _json("error", nullable=True),
    _json("progress"),
    _json("best", nullable=True),
    # Usage; held_seconds counts the attempts that are over.
    Column("held_seconds", Double, nullable=False),
    _size("tokens"),
    _size("peak_memory_bytes"),
    _size("artifact_bytes"),
    _number("attempt"),
    # In a row: since something of the job's work was last kept.
    _number("crashes"),
    _number("last_sequence"),
    _number("last_step"),
    # The lease: who holds the job since when and until when. The epoch outlives it.
    Column("lease_epoch", BigInteger, nullable=False),
    Column("worker_id", Text),
    _time("lease_start_time", nullable=True),
    _time("lease_end_time", nullable=True),
    _time("create_time"),
    _time("update_time"),
    _time("start_time", nullable=True),
    _time("end_time", nullable=True),
    _json("estimate", nullable=True),
    _id("retry_of_job_id", nullable=True),
    _size("peak_device_memory_bytes"),
    PrimaryKeyConstraint("organization", "job_id"),
    ForeignKeyConstraint(["organization", "model_id"], ["models.organization", "models.model_id"], name="jobs_model"),
    _of_dataset("dataset_id"),
    _of_dataset("eval_dataset_id"),
    Index("jobs_by_model", "organization", "model_id", "job_id"),
    Index("jobs_by_state", "organization", "state", "job_id"),
    Index("jobs_by_kind", "organization", "kind", "job_id"),
    Index("jobs_by_dataset", "organization", "dataset_id", postgresql_where=text("dataset_id IS NOT NULL")),
    Index("jobs_by_eval_dataset", "organization", "eval_dataset_id", postgresql_where=text("eval_dataset_id IS NOT NULL")),
    # One retry of each job at most; and the way back along a chain of them.
    Index("jobs_by_retried", "organization", "retry_of_job_id", unique=True, postgresql_where=text("retry_of_job_id IS NOT NULL")),
    Index("jobs_active", "organization", "base_model", postgresql_where=IS_ACTIVE),
    # The worker looks over all organizations; these stay as small as the queue is.
    Index("jobs_queued", "job_id", "kind", postgresql_where=IS_QUEUED),
    Index("jobs_held", "kind", postgresql_where=IS_HELD),
)

job_events = Table(
    "job_events",
    metadata,
    _id("organization"),
    _id("job_id"),
    _number("sequence"),
    _time("time"),
    _number("attempt"),
    _text("kind"),
    _number("step", nullable=True),
    _json("payload"),
    PrimaryKeyConstraint("organization", "job_id", "sequence"),
    ForeignKeyConstraint(["organization", "job_id"], ["jobs.organization", "jobs.job_id"], name="job_events_of_job", ondelete="CASCADE"),
    # The attempts at a job: a few of its events.
    Index("job_events_of_states", "organization", "job_id", "sequence", postgresql_where=IS_STATE_EVENT),
    # The training curve; and the proof that no step, evaluation or checkpoint is logged twice.
    Index("job_events_by_step", "organization", "job_id", "kind", "step", unique=True, postgresql_where=text("step IS NOT NULL")),
)

checkpoints = Table(
    "checkpoints",
    metadata,
    _id("organization"),
    _id("job_id"),
    _number("step"),
    _text("path"),
    _size("size_bytes"),
    Column("eval_loss", Double),
    _time("create_time"),
    Column("best", Boolean, nullable=False),
    PrimaryKeyConstraint("organization", "job_id", "step"),
    ForeignKeyConstraint(["organization", "job_id"], ["jobs.organization", "jobs.job_id"], name="checkpoints_of_job", ondelete="CASCADE"),
)

documents = Table(
    "documents",
    metadata,
    _id("organization"),
    _id("model_id"),
    _id("document_id"),
    _text("title"),
    _text("source_uri"),
    _text("text"),
    _json("metadata"),
    _text("state"),
    _number("size_characters"),
    _size("size_bytes"),
    _text("content_sha256"),
    _number("chunk_count"),
    _text("error"),
    _time("create_time"),
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
    _id("organization"),
    _id("model_id"),
    _id("document_id"),
    _number("position"),
    _id("chunk_id"),
    _text("text"),
    _number("char_start"),
    _number("char_end"),
    _number("token_count"),
    _number("page", nullable=True),
    PrimaryKeyConstraint("organization", "model_id", "document_id", "position"),
    _of_document("chunks_of_document"),
)

# Apart from the texts, so that an exact scan reads vectors and nothing else.
chunk_vectors = Table(
    "chunk_vectors",
    metadata,
    _id("organization"),
    _id("model_id"),
    _id("document_id"),
    _number("position"),
    Column("embedding", HalfVector, nullable=False),
    PrimaryKeyConstraint("organization", "model_id", "document_id", "position"),
    _of_document("chunk_vectors_of_document"),
)

# What the lexical search compares: the words that find a chunk in a large collection, and the weights of all its terms.
chunk_terms = Table(
    "chunk_terms",
    metadata,
    _id("organization"),
    _id("model_id"),
    _id("document_id"),
    _number("position"),
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
    _id("organization"),
    _id("model_id"),
    _number("term"),
    _number("chunk_count"),
    PrimaryKeyConstraint("organization", "model_id", "term"),
    ForeignKeyConstraint(
        ["organization", "model_id"], ["models.organization", "models.model_id"], name="term_counts_of_model", ondelete="CASCADE"
    ),
)

requests = Table(
    "requests",
    metadata,
    _id("organization"),
    _id("method"),
    _id("request_id"),
    _text("body_sha256"),
    _json("resource_ids"),
    _time("create_time"),
    PrimaryKeyConstraint("organization", "method", "request_id"),
)
