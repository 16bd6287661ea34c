"""Rows and events to test with, and the few steps that most tests begin with."""

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime

import numpy
from numpy.typing import NDArray

from server.db.database import PostgresDatabase
from server.db.queue import PostgresJobQueue
from server.domain.datasets import Dataset, DatasetFormat, RecordKind
from server.domain.documents import NewDocument
from server.domain.errors import ErrorData
from server.domain.events import Evaluated, JobEvent, ResultReady, StepDone
from server.domain.findings import Finding
from server.domain.generation import GenerationParameters
from server.domain.ids import CHUNK, DATASET, DOCUMENT, JOB, MODEL, new_id
from server.domain.jobs import Checkpoint, FailureReason, Job, JobKind, JobState
from server.domain.models import Model, ModelState, ModelType, RagConfiguration
from server.domain.retrieval import Chunk, Chunking, RetrievalSettings
from server.domain.specs import (
    BatchSpec,
    ExportFormat,
    ExportSpec,
    FineTuneSpec,
    IndexSpec,
    LossOn,
    OverlongPolicy,
    Scheduler,
    TrainingParameters,
)
from server.domain.techniques import LoraTechnique
from server.services.job_queue import Claim, ClaimLimits, Lease

ORGANIZATION = "default"
BASE_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
LIMITS = ClaimLimits(training_jobs=100, index_jobs=100, batch_jobs=100)
LEASE_SECONDS = 30.0
RESULT = ResultReady("default/models/m/j-1", "e" * 64, 1_000, "main", {"eval_loss": 1.5}, 2.0, 5_000)

PARAMETERS = TrainingParameters(
    epochs=1.0,
    max_steps=None,
    batch_size=4,
    learning_rate=2e-4,
    scheduler=Scheduler.COSINE,
    warmup_steps=1,
    weight_decay=0.0,
    max_gradient_norm=1.0,
    max_sequence_tokens=512,
    overlong_policy=OverlongPolicy.REJECT,
    loss_on=LossOn.ASSISTANT,
    seed=7,
    evaluate_every_steps=5,
    checkpoint_every_steps=5,
)


def make_model() -> Model:
    """A fine-tuned model to be."""
    now = datetime.now(UTC)
    return Model(
        new_id(MODEL), ModelType.FINE_TUNED, "Teller", ModelState.CREATING, BASE_MODEL, now, now, labels={"team": "أ"}, technique="LORA"
    )


def make_rag_model(generator: str = BASE_MODEL) -> Model:
    """A RAG model to be."""
    rag = RagConfiguration(generator, "all-MiniLM", RetrievalSettings(), Chunking(), "Answer from {context}")
    return replace(make_model(), type=ModelType.RAG, technique="", rag=rag)


def make_dataset() -> Dataset:
    """A dataset with one bad record."""
    dataset_id = new_id(DATASET)
    return Dataset(
        dataset_id,
        "Announcements",
        DatasetFormat.JSONL,
        RecordKind.CHAT,
        10,
        1,
        2_000,
        "a" * 64,
        f"default/datasets/{dataset_id}/records.jsonl",
        datetime.now(UTC),
        (Finding(3, "BROKEN_JSON", "The line is not JSON."),),
    )


def make_job(model: Model, dataset: Dataset | None = None, kind: JobKind | None = None) -> Job:
    """A QUEUED job that makes this model."""
    now = datetime.now(UTC)
    chosen = kind or (JobKind.RAG_INDEX if model.rag else JobKind.FINE_TUNE)
    spec: FineTuneSpec | IndexSpec = IndexSpec("all-MiniLM", Chunking(128, 16))
    if chosen is not JobKind.RAG_INDEX:
        spec = FineTuneSpec(model.base_model, dataset.dataset_id if dataset else "", "a" * 64, LoraTechnique(), PARAMETERS)
    return Job(new_id(JOB), chosen, model.model_id, JobState.QUEUED, spec, now, now)


def make_export(model: Model, version: int = 1, form: ExportFormat = ExportFormat.ADAPTER) -> Job:
    """A QUEUED job that exports a version."""
    now = datetime.now(UTC)
    return Job(new_id(JOB), JobKind.EXPORT, model.model_id, JobState.QUEUED, ExportSpec(model.base_model, version, form), now, now)


def make_batch(dataset: Dataset, model: Model | None = None, version: int = 1) -> Job:
    """A QUEUED job that answers a dataset by a version of a model, or by the base model."""
    now = datetime.now(UTC)
    spec = BatchSpec(BASE_MODEL, version if model else None, dataset.dataset_id, dataset.sha256, GenerationParameters(seed=7))
    return Job(new_id(JOB), JobKind.BATCH_GENERATION, model.model_id if model else BASE_MODEL, JobState.QUEUED, spec, now, now)


def make_step(step: int, total: int = 100) -> StepDone:
    """The event of a training step."""
    return StepDone(step, total, step / total, 3.0 - step / total, 1e-4, 0.5, step * 100, step * 40, 250.0, float(total - step), step * 10)


def make_evaluation(step: int, loss: float, *, best: bool = True) -> Evaluated:
    """The event of an evaluation."""
    return Evaluated(step, loss, 500, 5, 0.1, best)


def make_checkpoint(step: int, epoch: int = 1) -> Checkpoint:
    """A checkpoint as a child tells of it."""
    return Checkpoint(step, f"default/jobs/j/checkpoint-{step}-{epoch}", 1_000, datetime.now(UTC), 1.25)


def make_chunks(texts: Sequence[str]) -> list[Chunk]:
    """One chunk for each text, one after the other."""
    return [Chunk(new_id(CHUNK), place, text, place * 10, place * 10 + len(text), 5, place + 1) for place, text in enumerate(texts)]


def make_vectors(count: int, dimension: int = 8, seed: int = 0) -> NDArray[numpy.float16]:
    """Unit vectors [count, dimension] as float16."""
    numbers = numpy.random.default_rng(seed).normal(size=(count, dimension))
    vectors: NDArray[numpy.float16] = (numbers / numpy.linalg.norm(numbers, axis=1, keepdims=True)).astype("<f2")
    return vectors


async def add_model(database: PostgresDatabase, model: Model | None = None, organization: str = ORGANIZATION) -> Model:
    """Store a model."""
    added = model or make_model()
    async with database.transaction(organization) as transaction:
        await transaction.models.insert(added)
    return added


async def add_dataset(database: PostgresDatabase, organization: str = ORGANIZATION) -> Dataset:
    """Store a dataset."""
    added = make_dataset()
    async with database.transaction(organization) as transaction:
        await transaction.datasets.insert(added)
    return added


async def add_job(
    database: PostgresDatabase,
    model: Model | None = None,
    organization: str = ORGANIZATION,
    *,
    dataset: Dataset | None = None,
    kind: JobKind | None = None,
    job: Job | None = None,
) -> Job:
    """Store a job: the given one, or one for a model, which is stored too where none is given."""
    added = job or make_job(model or await add_model(database, organization=organization), dataset, kind)
    async with database.transaction(organization) as transaction:
        await transaction.jobs.insert(added)
    return added


async def add_documents(database: PostgresDatabase, model: Model, texts: Sequence[str]) -> list[str]:
    """Store PENDING documents; give their ids."""
    made = [NewDocument(text, f"Title of {text}", "https://example.org", {"place": place}) for place, text in enumerate(texts)]
    new = [(new_id(DOCUMENT), document) for document in made]
    async with database.transaction(ORGANIZATION) as transaction:
        return [document.document_id for document in await transaction.documents.insert(model.model_id, new)]


async def claim(queue: PostgresJobQueue, lease_seconds: float = LEASE_SECONDS) -> Claim:
    """Claim the oldest job; there must be one."""
    claimed = await queue.claim("worker", LIMITS, lease_seconds)
    assert claimed is not None
    return claimed


async def start_job(database: PostgresDatabase, queue: PostgresJobQueue, model: Model | None = None, *, job: Job | None = None) -> Lease:
    """Store a job and bring it to RUNNING."""
    await add_job(database, model, job=job)
    lease = (await claim(queue)).lease
    await queue.change_state(lease, JobState.RUNNING, "")
    return lease


async def finish_job(queue: PostgresJobQueue, lease: Lease) -> None:
    """Bring a RUNNING job to SUCCEEDED."""
    await queue.change_state(lease, JobState.FINALIZING, "")
    assert await queue.complete(lease, RESULT)


async def fail_job(database: PostgresDatabase, queue: PostgresJobQueue, *steps: int) -> Job:
    """Store a job that FAILED after it had saved these steps."""
    lease = await start_job(database, queue)
    for step in steps:
        await queue.append(lease, [make_step(step), make_evaluation(step, 9.0 - step)])
        await queue.record_checkpoint(lease, make_checkpoint(step), keep=2)
    await queue.fail(lease, FailureReason.DISK_FULL, ErrorData("ABORTED", "DISK_FULL", "The disk is full."))
    return await read_job(database, lease.job_id)


async def add_retry(database: PostgresDatabase, queue: PostgresJobQueue) -> tuple[Job, Job]:
    """Store a job that FAILED and one that tries it again; give both."""
    failed = await fail_job(database, queue, 5)
    retry = replace(make_job(await read_model(database, failed.model_id)), attempt=failed.attempt + 1, retry_of_job_id=failed.job_id)
    async with database.transaction(ORGANIZATION) as transaction:
        await transaction.jobs.insert(retry)
    return failed, retry


async def read_job(database: PostgresDatabase, job_id: str) -> Job:
    """Read a job as the api does."""
    async with database.transaction(ORGANIZATION) as transaction:
        return await transaction.jobs.get(job_id)


async def read_model(database: PostgresDatabase, model_id: str) -> Model:
    """Read a model as the api does."""
    async with database.transaction(ORGANIZATION) as transaction:
        return await transaction.models.get(model_id)


async def read_log(database: PostgresDatabase, job_id: str) -> Sequence[JobEvent]:
    """Read a job's whole log."""
    async with database.transaction(ORGANIZATION) as transaction:
        return await transaction.jobs.list_events(job_id, 0, 100_000)


async def change_state(database: PostgresDatabase, job_id: str, state: JobState) -> None:
    """Change a job's state as the api does."""
    async with database.transaction(ORGANIZATION) as transaction:
        await transaction.jobs.change_state(job_id, state, "asked for")
