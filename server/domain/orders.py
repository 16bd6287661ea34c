"""What a worker tells a child process to do: one JSON object on its standard input."""

from dataclasses import dataclass
from typing import Literal

from server.domain.specs import FineTuneSpec, IndexSpec


@dataclass(frozen=True, slots=True)
class FineTuneOrder:
    """Train. Paths are relative to MODEL_STORAGE_PATH; `checkpoint_path` is the checkpoint to go on from.

    Checkpoints go to `{job_path}/checkpoint-{step}-{lease_epoch}`, the result to `artifact_path`.
    """

    job_id: str
    lease_epoch: int
    spec: FineTuneSpec
    dataset_path: str
    job_path: str
    artifact_path: str
    eval_dataset_path: str | None = None
    checkpoint_path: str | None = None
    kind: Literal["fine_tune"] = "fine_tune"


@dataclass(frozen=True, slots=True)
class IndexOrder:
    """Embed the documents of `documents_path`: JSONL of `DocumentText`, relative to MODEL_STORAGE_PATH."""

    job_id: str
    lease_epoch: int
    spec: IndexSpec
    documents_path: str
    document_count: int
    kind: Literal["rag_index"] = "rag_index"


Order = FineTuneOrder | IndexOrder


@dataclass(frozen=True, slots=True)
class DocumentText:
    """A line of an index order's documents file."""

    document_id: str
    title: str
    text: str
