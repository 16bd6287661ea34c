"""Building a RAG model's index anew beside the one that answers: another embedding model or chunking, or the same of other files."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from server.domain.errors import FailedPrecondition
from server.domain.findings import Finding
from server.domain.ids import JOB, new_id
from server.domain.jobs import Job, JobKind, JobState
from server.domain.models import Model, ModelState, RagConfiguration
from server.domain.retrieval import Chunking
from server.domain.specs import IndexSpec
from server.services.idempotency import find_issued, hash_body, remember
from server.services.model_ports import BaseModels
from server.services.ports import Database, Transaction
from server.services.rag_models import check_chunking, check_embedding_model, find_warnings
from server.services.requests import ReindexModel
from server.services.validation import MAX_REQUEST_ID_CHARACTERS, Violations


@dataclass(frozen=True, slots=True)
class Reindexed:
    """The job that builds the index, with what may disappoint."""

    job: Job
    findings: Sequence[Finding] = ()


class Reindexing:
    """The use case ReindexModel."""

    def __init__(self, database: Database, base_models: BaseModels) -> None:
        self._database = database
        self._base_models = base_models

    async def reindex(self, organization: str, request: ReindexModel) -> Reindexed:
        """Start the job that builds another index and lets it answer when it has all documents.

        Raises InvalidInput, NotFound, and FailedPrecondition for what is no RAG model that answers, or while another one is being built.
        """
        body = hash_body(request)
        found = Violations()
        found.text("request_id", request.request_id, MAX_REQUEST_ID_CHARACTERS)
        named = self._base_models.canonical_name(request.embedding_model)
        if named:
            await check_embedding_model(self._base_models, found, named)
        async with self._database.transaction(organization) as transaction:
            if issued := await find_issued(transaction, "ReindexModel", request.request_id, body):
                return Reindexed(await transaction.jobs.get(issued["job_id"]), find_warnings(issued["embedding_model"]))
            model = await transaction.models.get(request.model_id, lock=True)
            rag = _demand_answering(model)
            embedding_model = named or rag.embedding_model
            check_chunking(found, request.max_chunk_tokens, request.overlap_tokens, embedding_model, rag.chunking)
            found.raise_if_any()
            await _demand_alone(transaction, model.model_id)
            chunking = _merge_chunking(rag.chunking, request)
            if request.validate_only:
                spec = IndexSpec(embedding_model, chunking, embedding_backend=rag.embedding_backend, is_reindex=True)
                job = _new_job(model.model_id, spec)
                return Reindexed(replace(job, job_id=""), find_warnings(embedding_model))
            number = await transaction.models.add_index(model.model_id, embedding_model, chunking)
            job = _new_job(model.model_id, IndexSpec(embedding_model, chunking, number, rag.embedding_backend, is_reindex=True))
            await transaction.jobs.insert(job)
            made = {"job_id": job.job_id, "embedding_model": embedding_model}
            await remember(transaction, "ReindexModel", request.request_id, body, made)
            return Reindexed(await transaction.jobs.get(job.job_id), find_warnings(embedding_model))


def _demand_answering(model: Model) -> RagConfiguration:
    metadata = {"model_id": model.model_id, "state": model.state.value}
    if model.rag is None:
        raise FailedPrecondition("Only RAG models have an index.", reason="NOT_A_RAG_MODEL", metadata=metadata)
    if model.state is not ModelState.READY:
        raise FailedPrecondition(f"The model is {model.state.value}, not READY.", reason="MODEL_NOT_READY", metadata=metadata)
    return model.rag


async def _demand_alone(transaction: Transaction, model_id: str) -> None:
    """Refuse a second index in the making: which one would answer in the end would be chance. The model's row must be locked."""
    if job_id := await transaction.jobs.find_reindex(model_id):
        raise FailedPrecondition(
            f"The model's index is being built anew already, by the job {job_id}. Cancel it or wait for its end.",
            reason="REINDEX_RUNNING",
            metadata={"job_id": job_id, "model_id": model_id},
        )


def _merge_chunking(own: Chunking, request: ReindexModel) -> Chunking:
    return Chunking(
        own.max_tokens if request.max_chunk_tokens is None else request.max_chunk_tokens,
        own.overlap_tokens if request.overlap_tokens is None else request.overlap_tokens,
    )


def _new_job(model_id: str, spec: IndexSpec) -> Job:
    now = datetime.now(UTC)
    return Job(
        job_id=new_id(JOB), kind=JobKind.RAG_INDEX, model_id=model_id, state=JobState.QUEUED, spec=spec, create_time=now, update_time=now
    )
