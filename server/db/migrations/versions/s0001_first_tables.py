"""The first tables: models, datasets, jobs with their log, documents with their vectors, request ids."""

from collections.abc import Sequence

from alembic import op

revision: str = "0001"
down_revision: str | None = None
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None

TABLES = """
CREATE TABLE datasets (
    organization TEXT COLLATE "C" NOT NULL,
    dataset_id TEXT COLLATE "C" NOT NULL,
    display_name TEXT NOT NULL,
    format TEXT NOT NULL,
    record_kind TEXT NOT NULL,
    record_count BIGINT NOT NULL,
    invalid_record_count BIGINT NOT NULL,
    size_bytes BIGINT NOT NULL,
    sha256 TEXT NOT NULL,
    path TEXT NOT NULL,
    findings JSONB NOT NULL,
    create_time TIMESTAMPTZ NOT NULL,
    PRIMARY KEY (organization, dataset_id)
);

CREATE TABLE models (
    organization TEXT COLLATE "C" NOT NULL,
    model_id TEXT COLLATE "C" NOT NULL,
    type TEXT NOT NULL,
    display_name TEXT NOT NULL,
    description TEXT NOT NULL,
    labels JSONB NOT NULL,
    state TEXT NOT NULL,
    base_model TEXT COLLATE "C" NOT NULL,
    technique TEXT NOT NULL,
    serving_version INTEGER,
    rag JSONB,
    generator_model_id TEXT COLLATE "C",
    embedding_dimension INTEGER,
    error JSONB,
    create_time TIMESTAMPTZ NOT NULL,
    update_time TIMESTAMPTZ NOT NULL,
    PRIMARY KEY (organization, model_id),
    CONSTRAINT models_generator FOREIGN KEY (organization, generator_model_id)
        REFERENCES models (organization, model_id)
);
CREATE INDEX models_by_base_model ON models (organization, base_model, model_id);
CREATE INDEX models_by_generator ON models (organization, generator_model_id) WHERE generator_model_id IS NOT NULL;
CREATE INDEX models_by_state ON models (organization, state, model_id);
CREATE INDEX models_by_type ON models (organization, type, model_id);

CREATE TABLE requests (
    organization TEXT COLLATE "C" NOT NULL,
    method TEXT COLLATE "C" NOT NULL,
    request_id TEXT COLLATE "C" NOT NULL,
    body_sha256 TEXT NOT NULL,
    resource_ids JSONB NOT NULL,
    create_time TIMESTAMPTZ NOT NULL,
    PRIMARY KEY (organization, method, request_id)
);

CREATE TABLE documents (
    organization TEXT COLLATE "C" NOT NULL,
    model_id TEXT COLLATE "C" NOT NULL,
    document_id TEXT COLLATE "C" NOT NULL,
    title TEXT NOT NULL,
    source_uri TEXT NOT NULL,
    text TEXT NOT NULL,
    metadata JSONB NOT NULL,
    state TEXT NOT NULL,
    size_characters INTEGER NOT NULL,
    size_bytes BIGINT NOT NULL,
    content_sha256 TEXT NOT NULL,
    chunk_count INTEGER NOT NULL,
    error TEXT NOT NULL,
    create_time TIMESTAMPTZ NOT NULL,
    PRIMARY KEY (organization, model_id, document_id),
    CONSTRAINT documents_of_model FOREIGN KEY (organization, model_id)
        REFERENCES models (organization, model_id) ON DELETE CASCADE
);
CREATE INDEX documents_pending ON documents (organization, model_id, document_id) WHERE state = 'PENDING';

CREATE TABLE jobs (
    organization TEXT COLLATE "C" NOT NULL,
    job_id TEXT COLLATE "C" NOT NULL,
    kind TEXT NOT NULL,
    model_id TEXT COLLATE "C" NOT NULL,
    state TEXT NOT NULL,
    state_reason TEXT NOT NULL,
    spec JSONB NOT NULL,
    base_model TEXT COLLATE "C",
    dataset_id TEXT COLLATE "C",
    eval_dataset_id TEXT COLLATE "C",
    error JSONB,
    progress JSONB NOT NULL,
    best JSONB,
    held_seconds DOUBLE PRECISION NOT NULL,
    tokens BIGINT NOT NULL,
    peak_memory_bytes BIGINT NOT NULL,
    artifact_bytes BIGINT NOT NULL,
    attempt INTEGER NOT NULL,
    crashes INTEGER NOT NULL,
    last_sequence INTEGER NOT NULL,
    last_step INTEGER NOT NULL,
    lease_epoch BIGINT NOT NULL,
    worker_id TEXT,
    lease_start_time TIMESTAMPTZ,
    lease_end_time TIMESTAMPTZ,
    create_time TIMESTAMPTZ NOT NULL,
    update_time TIMESTAMPTZ NOT NULL,
    start_time TIMESTAMPTZ,
    end_time TIMESTAMPTZ,
    PRIMARY KEY (organization, job_id),
    CONSTRAINT jobs_model FOREIGN KEY (organization, model_id) REFERENCES models (organization, model_id),
    CONSTRAINT jobs_dataset_id FOREIGN KEY (organization, dataset_id)
        REFERENCES datasets (organization, dataset_id) ON DELETE SET NULL (dataset_id),
    CONSTRAINT jobs_eval_dataset_id FOREIGN KEY (organization, eval_dataset_id)
        REFERENCES datasets (organization, dataset_id) ON DELETE SET NULL (eval_dataset_id)
);
CREATE INDEX jobs_active ON jobs (organization, base_model)
    WHERE state NOT IN ('CANCELLED', 'FAILED', 'SUCCEEDED');
CREATE INDEX jobs_by_dataset ON jobs (organization, dataset_id) WHERE dataset_id IS NOT NULL;
CREATE INDEX jobs_by_eval_dataset ON jobs (organization, eval_dataset_id) WHERE eval_dataset_id IS NOT NULL;
CREATE INDEX jobs_by_kind ON jobs (organization, kind, job_id);
CREATE INDEX jobs_by_model ON jobs (organization, model_id, job_id);
CREATE INDEX jobs_by_state ON jobs (organization, state, job_id);
CREATE INDEX jobs_held ON jobs (kind) WHERE state IN ('CANCELLING', 'FINALIZING', 'PAUSING', 'RUNNING', 'STARTING');
CREATE INDEX jobs_queued ON jobs (job_id, kind) WHERE state = 'QUEUED';

CREATE TABLE model_versions (
    organization TEXT COLLATE "C" NOT NULL,
    model_id TEXT COLLATE "C" NOT NULL,
    version INTEGER NOT NULL,
    job_id TEXT COLLATE "C" NOT NULL,
    base_model TEXT NOT NULL,
    base_revision TEXT NOT NULL,
    artifact_path TEXT NOT NULL,
    manifest_sha256 TEXT NOT NULL,
    size_bytes BIGINT NOT NULL,
    metrics JSONB NOT NULL,
    create_time TIMESTAMPTZ NOT NULL,
    PRIMARY KEY (organization, model_id, version),
    CONSTRAINT model_versions_of_job UNIQUE (organization, job_id),
    CONSTRAINT model_versions_of_model FOREIGN KEY (organization, model_id)
        REFERENCES models (organization, model_id) ON DELETE CASCADE
);

CREATE TABLE checkpoints (
    organization TEXT COLLATE "C" NOT NULL,
    job_id TEXT COLLATE "C" NOT NULL,
    step INTEGER NOT NULL,
    path TEXT NOT NULL,
    size_bytes BIGINT NOT NULL,
    eval_loss DOUBLE PRECISION,
    create_time TIMESTAMPTZ NOT NULL,
    PRIMARY KEY (organization, job_id, step),
    CONSTRAINT checkpoints_of_job FOREIGN KEY (organization, job_id)
        REFERENCES jobs (organization, job_id) ON DELETE CASCADE
);

CREATE TABLE chunk_vectors (
    organization TEXT COLLATE "C" NOT NULL,
    model_id TEXT COLLATE "C" NOT NULL,
    document_id TEXT COLLATE "C" NOT NULL,
    position INTEGER NOT NULL,
    embedding halfvec NOT NULL,
    PRIMARY KEY (organization, model_id, document_id, position),
    CONSTRAINT chunk_vectors_of_document FOREIGN KEY (organization, model_id, document_id)
        REFERENCES documents (organization, model_id, document_id) ON DELETE CASCADE
);

CREATE TABLE chunks (
    organization TEXT COLLATE "C" NOT NULL,
    model_id TEXT COLLATE "C" NOT NULL,
    document_id TEXT COLLATE "C" NOT NULL,
    position INTEGER NOT NULL,
    chunk_id TEXT COLLATE "C" NOT NULL,
    text TEXT NOT NULL,
    char_start INTEGER NOT NULL,
    char_end INTEGER NOT NULL,
    token_count INTEGER NOT NULL,
    page INTEGER,
    PRIMARY KEY (organization, model_id, document_id, position),
    CONSTRAINT chunks_of_document FOREIGN KEY (organization, model_id, document_id)
        REFERENCES documents (organization, model_id, document_id) ON DELETE CASCADE
);

CREATE TABLE job_events (
    organization TEXT COLLATE "C" NOT NULL,
    job_id TEXT COLLATE "C" NOT NULL,
    sequence INTEGER NOT NULL,
    time TIMESTAMPTZ NOT NULL,
    attempt INTEGER NOT NULL,
    kind TEXT NOT NULL,
    step INTEGER,
    payload JSONB NOT NULL,
    PRIMARY KEY (organization, job_id, sequence),
    CONSTRAINT job_events_of_job FOREIGN KEY (organization, job_id)
        REFERENCES jobs (organization, job_id) ON DELETE CASCADE
);
CREATE UNIQUE INDEX job_events_by_step ON job_events (organization, job_id, kind, step) WHERE step IS NOT NULL;
"""

# A job's row is updated at each training step: room on its page keeps these updates off the indexes.
# A vector stays in its row up to a page (a halfvec of 1,024 numbers has 2,056 bytes, over the usual 2 KB limit): a scan must not follow
# a pointer per vector. A longer one moves out of line, uncompressed.
STORAGE = """
ALTER TABLE jobs SET (fillfactor = 70);
ALTER TABLE chunk_vectors ALTER COLUMN embedding SET STORAGE EXTERNAL, SET (toast_tuple_target = 8160);
"""


def upgrade() -> None:
    """Make every table."""
    op.execute(TABLES)
    op.execute(STORAGE)


def downgrade() -> None:
    """Refuse: going back before the first tables would drop all data."""
    raise RuntimeError("there is no way back before the first tables: restore a backup instead")
