"""What a worker tells a child process to do: one JSON object on its standard input."""

from dataclasses import dataclass
from typing import Literal

from server.domain.datasets import DatasetFormat, RecordKind
from server.domain.documents import DocumentContent
from server.domain.generation import ModelReference
from server.domain.specs import BatchSpec, ExportSpec, FineTuneSpec, IndexSpec


@dataclass(frozen=True, slots=True)
class DatasetFile:
    """Where a dataset's file lies and how to read it. `record_kind` MIXED: recognised record by record. The count is of good ones."""

    path: str
    sha256: str
    format: DatasetFormat
    record_kind: RecordKind
    record_count: int
    invalid_record_count: int = 0


@dataclass(frozen=True, slots=True)
class FineTuneOrder:
    """Train. Paths are relative to MODEL_STORAGE_PATH; `checkpoint_path` is the checkpoint to go on from.

    Checkpoints go to `{job_path}/checkpoint-{step}-{lease_epoch}`, the result to `artifact_path`. `best_checkpoint_path` is the
    checkpoint of the best evaluation so far, where it is kept; `warm_start_path` the artefact whose weights training starts from.
    """

    job_id: str
    lease_epoch: int
    spec: FineTuneSpec
    dataset: DatasetFile
    job_path: str
    artifact_path: str
    eval_dataset: DatasetFile | None = None
    checkpoint_path: str | None = None
    best_checkpoint_path: str | None = None
    warm_start_path: str | None = None
    warm_start_manifest_sha256: str | None = None
    kind: Literal["fine_tune"] = "fine_tune"


@dataclass(frozen=True, slots=True)
class IndexOrder:
    """Embed the documents of `documents_path`: JSONL of `StagedDocument`, relative to MODEL_STORAGE_PATH.

    `calibrated_fingerprint`: of the space in which the similarity of unrelated texts was measured for this index; empty where it was not.
    """

    job_id: str
    lease_epoch: int
    spec: IndexSpec
    documents_path: str
    document_count: int
    calibrated_fingerprint: str = ""
    kind: Literal["rag_index"] = "rag_index"


@dataclass(frozen=True, slots=True)
class ExportOrder:
    """Write the version at `version_path` (sealed by its manifest) in another form to `artifact_path`."""

    job_id: str
    lease_epoch: int
    spec: ExportSpec
    version_path: str
    version_manifest_sha256: str
    artifact_path: str
    kind: Literal["export"] = "export"


@dataclass(frozen=True, slots=True)
class BatchOrder:
    """Answer the records of a dataset that the parts, in their order, have no answer to; then put all together at `artifact_path`.

    New parts go to `{job_path}/checkpoint-{records done}-{lease_epoch}`.
    """

    job_id: str
    lease_epoch: int
    spec: BatchSpec
    model: ModelReference
    dataset: DatasetFile
    job_path: str
    artifact_path: str
    part_paths: tuple[str, ...] = ()
    kind: Literal["batch_generation"] = "batch_generation"


Order = FineTuneOrder | IndexOrder | ExportOrder | BatchOrder


@dataclass(frozen=True, slots=True)
class StagedDocument:
    """A line of an index order's documents file: a content that waits to be indexed, a text or the file at `path`.

    `content`: of a document that is indexed already and comes into another index, what was read of it, to be cut again.
    `known_chunks` are the hashes of the chunks that the document's index has of the content before.
    """

    document_id: str
    title: str = ""
    text: str = ""
    path: str = ""
    revision: int = 1
    source_uri: str = ""
    known_chunks: tuple[str, ...] = ()
    content: DocumentContent | None = None
