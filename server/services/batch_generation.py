"""Batch generation: the job that answers each record of a dataset, and its result as a stream of bytes."""

from collections.abc import AsyncGenerator
from dataclasses import replace
from datetime import UTC, datetime

from server.domain.datasets import Dataset, RecordKind
from server.domain.errors import FailedPrecondition, InvalidInput, NotFound
from server.domain.generation import GenerationParameters, ModelReference
from server.domain.ids import JOB, new_id
from server.domain.jobs import BATCH_RESULT_NAME, Job, JobKind, JobState
from server.domain.specs import BatchSpec
from server.services.generating import draw_seed
from server.services.idempotency import find_issued, hash_body, remember
from server.services.ports import Artefacts, Database, Transaction
from server.services.references import References
from server.services.requests import CreateBatchGeneration
from server.services.validation import MAX_REQUEST_ID_CHARACTERS, Violations, check_generation

METHOD = "CreateBatchGeneration"
# Why records of these kinds are no prompts.
_NO_PROMPTS = {
    RecordKind.PREFERENCE: "holds preference pairs, which have two answers and are only learnt from",
    RecordKind.RETRIEVAL: "holds queries to evaluate retrieval by",
}


class BatchGeneration:
    """The use cases CreateBatchGeneration and DownloadJobResult."""

    def __init__(self, database: Database, references: References, artefacts: Artefacts) -> None:
        self._database = database
        self._references = references
        self._artefacts = artefacts

    async def create(self, organization: str, request: CreateBatchGeneration) -> Job:
        """Store the job. Raises InvalidInput naming every bad field, FailedPrecondition for a model that cannot answer now."""
        body = hash_body(request)
        async with self._database.transaction(organization) as transaction:
            if issued := await find_issued(transaction, METHOD, request.request_id, body):
                return await transaction.jobs.get(issued["job_id"])
        job = await self._plan(organization, request)
        if request.validate_only:
            return replace(job, job_id="")
        async with self._database.transaction(organization) as transaction:
            if issued := await find_issued(transaction, METHOD, request.request_id, body):
                return await transaction.jobs.get(issued["job_id"])
            if isinstance(job.spec, BatchSpec) and job.spec.version is not None:
                # Locked, and looked at again: the plan was made without holding anything.
                await transaction.models.get(job.model_id, lock=True)
                await transaction.models.get_version(job.model_id, job.spec.version)
            await transaction.jobs.insert(job)
            await remember(transaction, METHOD, request.request_id, body, {"job_id": job.job_id})
            return await transaction.jobs.get(job.job_id)

    async def read_result(self, organization: str, job_id: str) -> AsyncGenerator[bytes, None]:
        """Stream a job's result, its hash checked before. Raises NotFound, FailedPrecondition where there is none (yet, or any more)."""
        async with self._database.transaction(organization) as transaction:
            job = await transaction.jobs.get(job_id)
            _check_has_result(job)
            result = await transaction.jobs.get_result(job_id)
        async for piece in self._artefacts.read_file(result.path, result.manifest_sha256, BATCH_RESULT_NAME):
            yield piece

    async def _plan(self, organization: str, request: CreateBatchGeneration) -> Job:
        """Check everything and fill in what was left out; stores nothing."""
        found = Violations()
        found.text("request_id", request.request_id, MAX_REQUEST_ID_CHARACTERS)
        found.number("version", request.version, 1, 2**31 - 1)
        check_generation(found, request.parameters)
        async with self._database.transaction(organization) as transaction:
            dataset = await _find_dataset(transaction, found, request.dataset_id)
        model = await self._find_model(organization, found, request)
        found.raise_if_any()
        # What is missing was noted.
        assert dataset is not None
        assert model is not None
        return _new_job(request, model, dataset)

    async def _find_model(self, organization: str, found: Violations, request: CreateBatchGeneration) -> ModelReference | None:
        try:
            return await self._references.resolve(organization, request.model_id, request.version)
        except InvalidInput as error:
            found.extend(error, "")
        except NotFound as error:
            found.add("version" if error.reason == "MODEL_VERSION_NOT_FOUND" else "model_id", str(error))
        except FailedPrecondition:
            found.raise_if_any()  # what is wrong in itself is told first: waiting does not help
            raise
        return None


async def _find_dataset(transaction: Transaction, found: Violations, dataset_id: str) -> Dataset | None:
    if not dataset_id:
        found.add("dataset_id", "is required")
        return None
    try:
        dataset = await transaction.datasets.get(dataset_id)
    except NotFound as error:
        found.add("dataset_id", str(error))
        return None
    if why := _NO_PROMPTS.get(dataset.record_kind):
        found.add("dataset_id", f"{why}: there is nothing to answer")
    return dataset


def _new_job(request: CreateBatchGeneration, model: ModelReference, dataset: Dataset) -> Job:
    now = datetime.now(UTC)
    parameters = _fix_seed(request.parameters)
    return Job(
        job_id=new_id(JOB),
        kind=JobKind.BATCH_GENERATION,
        model_id=model.model_id,
        state=JobState.QUEUED,
        spec=BatchSpec(model.base_model, model.version, dataset.dataset_id, dataset.sha256, parameters, request.history),
        create_time=now,
        update_time=now,
    )


def _fix_seed(parameters: GenerationParameters) -> GenerationParameters:
    """Draw the seed where the caller left it out, so that an attempt that goes on, or a repetition, samples the same."""
    if parameters.seed is not None:
        return parameters
    return replace(parameters, seed=draw_seed())


def _check_has_result(job: Job) -> None:
    if job.kind is not JobKind.BATCH_GENERATION:
        raise FailedPrecondition(
            f"The job is of kind {job.kind.value}, whose result is no file: only a BATCH_GENERATION has one to download.",
            reason="JOB_HAS_NO_RESULT",
            metadata={"job_id": job.job_id, "kind": job.kind.value},
        )
    if job.state is not JobState.SUCCEEDED:
        raise FailedPrecondition(
            f"The job is {job.state.value}: there is a result once it has SUCCEEDED.",
            reason="JOB_NOT_SUCCEEDED",
            metadata={"job_id": job.job_id, "state": job.state.value},
        )
