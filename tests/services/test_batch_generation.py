"""Batch generation: everything wrong is told at once, and what is left out is filled in; who may have which result."""

from collections.abc import AsyncGenerator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from server.db.database import PostgresDatabase
from server.db.queue import PostgresJobQueue
from server.domain.datasets import RecordKind
from server.domain.errors import AlreadyExists, FailedPrecondition, InvalidInput, NotFound
from server.domain.generation import GenerationParameters, HistoryPolicy
from server.domain.jobs import BATCH_RESULT_NAME, JobKind, JobState
from server.domain.specs import BatchSpec
from server.services.requests import CreateBatchGeneration, UploadDataset
from server.storage.artefacts import ArtefactStore
from tests.db.samples import RESULT, add_dataset, add_job, add_model, claim, finish_job, make_dataset, start_job
from tests.services.conftest import BASE_MODEL, GOOD_LINE, ORGANIZATION, UseCases, fine_tune, pieces

LINES = b'{"record":1}\n'


@pytest.fixture
def queue(database: PostgresDatabase) -> PostgresJobQueue:
    """What a worker does to jobs."""
    return PostgresJobQueue(database)


async def read(stream: AsyncGenerator[bytes, None]) -> bytes:
    return b"".join([piece async for piece in stream])


async def ask(use_cases: UseCases, **changes: Any) -> CreateBatchGeneration:
    """A request that is fine but for `changes`."""
    dataset = await use_cases.datasets.upload(ORGANIZATION, UploadDataset("d"), pieces(GOOD_LINE))
    values: dict[str, Any] = {"model_id": BASE_MODEL, "dataset_id": dataset.dataset_id, "parameters": GenerationParameters(), **changes}
    return CreateBatchGeneration(**values)


async def test_what_is_left_out_is_filled_in(use_cases: UseCases) -> None:
    request = await ask(use_cases, history=HistoryPolicy.DROP_OLDEST)
    job = await use_cases.batches.create(ORGANIZATION, request)
    assert (job.kind, job.state, job.model_id) == (JobKind.BATCH_GENERATION, JobState.QUEUED, BASE_MODEL)
    assert isinstance(job.spec, BatchSpec)
    assert (job.spec.base_model, job.spec.version, job.spec.history) == (BASE_MODEL, None, HistoryPolicy.DROP_OLDEST)
    dataset = await use_cases.datasets.get(ORGANIZATION, request.dataset_id)
    assert job.spec.dataset_sha256 == dataset.sha256
    assert job.spec.parameters.seed is not None


async def test_a_fine_tuned_model_answers_by_the_version_that_serves_now(
    use_cases: UseCases, database: PostgresDatabase, queue: PostgresJobQueue
) -> None:
    model = await add_model(database)
    request = await ask(use_cases, model_id=model.model_id)
    with pytest.raises(FailedPrecondition, match="CREATING"):
        await use_cases.batches.create(ORGANIZATION, request)
    lease = await start_job(database, queue, model)
    await finish_job(queue, lease)
    job = await use_cases.batches.create(ORGANIZATION, request)
    assert isinstance(job.spec, BatchSpec)
    assert (job.model_id, job.spec.version) == (model.model_id, 1)
    claimed = await claim(queue)
    assert claimed.version is not None
    assert claimed.version.artifact_path == RESULT.artifact_path


async def test_every_bad_field_is_named_at_once(use_cases: UseCases, database: PostgresDatabase) -> None:
    foreign = await add_dataset(database, "another")
    parameters = GenerationParameters(temperature=9, n=17)
    cases: Mapping[str, Any] = {"no/such": "model_id", "": "model_id", "mdl_none": "model_id"}
    for model_id, field in cases.items():
        request = CreateBatchGeneration(model_id, foreign.dataset_id, parameters, version=0, request_id="r" * 129)
        with pytest.raises(InvalidInput) as refusal:
            await use_cases.batches.create(ORGANIZATION, request)
        fields = {violation.field for violation in refusal.value.data.violations}
        assert fields >= {"dataset_id", "version", "request_id", "parameters.temperature", "parameters.n"}, fields
        assert field in fields or model_id == "no/such"
    assert "There is no dataset" in str(refusal.value)  # another organization's is none


@pytest.mark.parametrize(("kind", "said"), [(RecordKind.PREFERENCE, "preference pairs"), (RecordKind.RETRIEVAL, "evaluate retrieval")])
async def test_records_that_are_no_prompts_are_refused(
    use_cases: UseCases, database: PostgresDatabase, kind: RecordKind, said: str
) -> None:
    dataset = replace(make_dataset(), record_kind=kind)
    async with database.transaction(ORGANIZATION) as transaction:
        await transaction.datasets.insert(dataset)
    with pytest.raises(InvalidInput, match=f"dataset_id: .*{said}"):
        await use_cases.batches.create(ORGANIZATION, await ask(use_cases, dataset_id=dataset.dataset_id))


async def test_the_same_request_again_gives_the_same_job(use_cases: UseCases) -> None:
    request = await ask(use_cases, request_id="r")
    preview = await use_cases.batches.create(ORGANIZATION, replace(request, request_id="", validate_only=True))
    assert preview.job_id == ""
    first = await use_cases.batches.create(ORGANIZATION, request)
    assert (await use_cases.batches.create(ORGANIZATION, request)).job_id == first.job_id
    with pytest.raises(AlreadyExists):
        await use_cases.batches.create(ORGANIZATION, replace(request, parameters=GenerationParameters(max_tokens=3)))


async def test_prompts_without_answers_are_answered_and_not_learnt(use_cases: UseCases) -> None:
    line = b'{"messages": [{"role": "user", "content": "q"}]}'
    dataset = await use_cases.datasets.upload(ORGANIZATION, UploadDataset("d", record_kind=RecordKind.PROMPT), pieces(line))
    assert (dataset.record_kind, dataset.record_count) == (RecordKind.PROMPT, 1)
    job = await use_cases.batches.create(ORGANIZATION, await ask(use_cases, dataset_id=dataset.dataset_id))
    assert job.state is JobState.QUEUED
    with pytest.raises(InvalidInput, match="prompts without answers"):
        await use_cases.models.create_fine_tuned_model(ORGANIZATION, fine_tune(dataset.dataset_id))


def _fill(directory: Path) -> Mapping[str, str]:
    (directory / BATCH_RESULT_NAME).write_bytes(LINES)
    return {}


async def test_a_result_is_downloaded_by_its_owner_and_goes_with_the_model(
    use_cases: UseCases, database: PostgresDatabase, queue: PostgresJobQueue
) -> None:
    model = await add_model(database)
    await finish_job(queue, await start_job(database, queue, model))
    job = await use_cases.batches.create(ORGANIZATION, await ask(use_cases, model_id=model.model_id))
    with pytest.raises(FailedPrecondition, match="QUEUED"):
        await read(use_cases.batches.read_result(ORGANIZATION, job.job_id))
    lease = (await claim(queue)).lease
    path = f"{ORGANIZATION}/jobs/{job.job_id}/{job.job_id}-{lease.epoch}"
    artefact = ArtefactStore(use_cases.storage).write(path, _fill)
    await queue.change_state(lease, JobState.RUNNING, "")
    await queue.change_state(lease, JobState.FINALIZING, "")
    await queue.complete(lease, replace(RESULT, artifact_path=path, manifest_sha256=artefact.manifest_sha256))
    assert await read(use_cases.batches.read_result(ORGANIZATION, job.job_id)) == LINES
    with pytest.raises(NotFound):
        await read(use_cases.batches.read_result("another", job.job_id))
    await use_cases.models.delete_model(ORGANIZATION, model.model_id)
    assert not artefact.directory.exists()


async def test_only_a_batch_has_a_result_to_download(use_cases: UseCases, database: PostgresDatabase) -> None:
    job = await add_job(database)
    with pytest.raises(FailedPrecondition, match="FINE_TUNE"):
        await read(use_cases.batches.read_result(ORGANIZATION, job.job_id))
