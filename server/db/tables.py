"""The tables as queries name them; migrations/ makes them, and a test holds the two equal.

`organization` comes first in every key: no key can tell of another organization's rows. Those of documents and chunks: document_tables.
"""

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Double,
    ForeignKeyConstraint,
    Index,
    PrimaryKeyConstraint,
    Table,
    Text,
    UniqueConstraint,
    literal_column,
    text,
)

from server.db.columns import identifier, json, metadata, number, size, string, time
from server.domain.jobs import HELD_STATES, TERMINAL_STATES

# The predicates of partial indexes. Queries use these very clauses, as literals: with a bound value a generic plan could not use the index.
IS_QUEUED = literal_column("state = 'QUEUED'", Boolean)
IS_HELD = literal_column(f"state IN ({', '.join(repr(state.value) for state in sorted(HELD_STATES))})", Boolean)
IS_ACTIVE = literal_column(f"state NOT IN ({', '.join(repr(state.value) for state in sorted(TERMINAL_STATES))})", Boolean)
# Of jobs that build a RAG model's index anew; false for all others.
IS_REINDEX = literal_column("coalesce(spec->>'is_reindex', '') = 'true'", Boolean)
IS_STATE_EVENT = literal_column("kind = 'state_changed'", Boolean)

models = Table(
    "models",
    metadata,
    identifier("organization"),
    identifier("model_id"),
    string("type"),
    string("display_name"),
    string("description"),
    json("labels"),
    string("state"),
    identifier("base_model"),
    string("technique"),
    number("serving_version", nullable=True),
    json("rag", nullable=True),
    # Of `rag`, where the generator is a model of ours: the foreign key keeps it from being deleted in the meantime.
    identifier("generator_model_id", nullable=True),
    json("error", nullable=True),
    time("create_time"),
    time("update_time"),
    # The number of the latest version that was ever made.
    number("last_version"),
    # Of a RAG model: the number of the index that answers.
    number("serving_index", nullable=True),
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
    identifier("organization"),
    identifier("model_id"),
    number("version"),
    identifier("job_id"),
    string("base_model"),
    string("base_revision"),
    string("artifact_path"),
    string("manifest_sha256"),
    size("size_bytes"),
    json("metrics"),
    time("create_time"),
    number("attempt"),
    number("checkpoint_step"),
    json("spec", nullable=True),
    json("library_versions"),
    string("template_sha256"),
    PrimaryKeyConstraint("organization", "model_id", "version"),
    UniqueConstraint("organization", "job_id", name="model_versions_of_job"),
    ForeignKeyConstraint(
        ["organization", "model_id"], ["models.organization", "models.model_id"], name="model_versions_of_model", ondelete="CASCADE"
    ),
)

model_exports = Table(
    "model_exports",
    metadata,
    identifier("organization"),
    identifier("model_id"),
    number("version"),
    string("format"),
    identifier("job_id"),
    string("artifact_path"),
    string("manifest_sha256"),
    size("size_bytes"),
    json("metrics"),
    time("create_time"),
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
    identifier("organization"),
    identifier("dataset_id"),
    string("display_name"),
    string("format"),
    string("record_kind"),
    size("record_count"),
    size("invalid_record_count"),
    size("size_bytes"),
    string("sha256"),
    string("path"),
    json("findings"),
    time("create_time"),
    json("finding_counts"),
    Column("compression", Text),
    string("source_uri"),
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
    identifier("organization"),
    identifier("job_id"),
    string("kind"),
    # NULL: it uses the base model of `base_model` and makes none.
    identifier("model_id", nullable=True),
    string("state"),
    string("state_reason"),
    json("spec"),
    # Copies out of `spec`, for keys and indexes.
    identifier("base_model", nullable=True),
    identifier("dataset_id", nullable=True),
    identifier("eval_dataset_id", nullable=True),
    json("error", nullable=True),
    json("progress"),
    json("best", nullable=True),
    # Usage; held_seconds counts the attempts that are over.
    Column("held_seconds", Double, nullable=False),
    size("tokens"),
    size("peak_memory_bytes"),
    size("artifact_bytes"),
    number("attempt"),
    # In a row: since something of the job's work was last kept.
    number("crashes"),
    number("last_sequence"),
    number("last_step"),
    # The lease: who holds the job since when and until when. The epoch outlives it.
    Column("lease_epoch", BigInteger, nullable=False),
    Column("worker_id", Text),
    time("lease_start_time", nullable=True),
    time("lease_end_time", nullable=True),
    time("create_time"),
    time("update_time"),
    time("start_time", nullable=True),
    time("end_time", nullable=True),
    json("estimate", nullable=True),
    identifier("retry_of_job_id", nullable=True),
    size("peak_device_memory_bytes"),
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
    identifier("organization"),
    identifier("job_id"),
    number("sequence"),
    time("time"),
    number("attempt"),
    string("kind"),
    number("step", nullable=True),
    json("payload"),
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
    identifier("organization"),
    identifier("job_id"),
    number("step"),
    string("path"),
    size("size_bytes"),
    Column("eval_loss", Double),
    time("create_time"),
    Column("best", Boolean, nullable=False),
    PrimaryKeyConstraint("organization", "job_id", "step"),
    ForeignKeyConstraint(["organization", "job_id"], ["jobs.organization", "jobs.job_id"], name="checkpoints_of_job", ondelete="CASCADE"),
)

# Of jobs whose result is a file to download, and no version.
job_results = Table(
    "job_results",
    metadata,
    identifier("organization"),
    identifier("job_id"),
    string("artifact_path"),
    string("manifest_sha256"),
    size("size_bytes"),
    time("create_time"),
    PrimaryKeyConstraint("organization", "job_id"),
    ForeignKeyConstraint(["organization", "job_id"], ["jobs.organization", "jobs.job_id"], name="job_results_of_job", ondelete="CASCADE"),
)

requests = Table(
    "requests",
    metadata,
    identifier("organization"),
    identifier("method"),
    identifier("request_id"),
    string("body_sha256"),
    json("resource_ids"),
    time("create_time"),
    PrimaryKeyConstraint("organization", "method", "request_id"),
)
