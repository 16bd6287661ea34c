"""Versions: what serves, what may be deleted and exported, whose bytes come, and what a warm start takes."""

from collections.abc import AsyncGenerator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from server.db.database import PostgresDatabase
from server.db.queue import PostgresJobQueue
from server.domain.errors import AlreadyExists, FailedPrecondition, InvalidInput, NotFound
from server.domain.ids import MODEL, new_id
from server.domain.jobs import Job, JobKind, JobState
from server.domain.models import Model
from server.domain.specs import ExportFormat, ExportSpec, FineTuneSpec, VersionReference
from server.domain.techniques import FullTechnique, Ia3, LoraTechnique, PrefixTuning, PromptTuning, PTuning, QloraTechnique, Technique
from server.services.job_queue import Lease
from server.services.requests import ExportVersion, ListVersions, PageRequest
from server.services.versions import FilesOf, resolve_format
from server.storage.artefacts import ArtefactStore
from tests.db.samples import RESULT, add_dataset, add_model, change_state, claim, make_job, read_job, read_model
from tests.services.conftest import BASE_MODEL, ORGANIZATION, UseCases, fine_tune


@pytest.fixture
def queue(database: PostgresDatabase) -> PostgresJobQueue:
    return PostgresJobQueue(database)


def _fill(directory: Path) -> Mapping[str, str]:
    (directory / "adapter_config.json").write_text(directory.name)
    return {}


async def finish(use_cases: UseCases, queue: PostgresJobQueue, lease: Lease) -> str:
    """End a claimed job with a result of real files; give its path."""
    job = await read_job(use_cases_database(queue), lease.job_id)
    path = f"{ORGANIZATION}/models/{job.model_id}/{job.job_id}-{lease.epoch}"
    artefact = ArtefactStore(use_cases.storage).write(path, _fill)
    await queue.change_state(lease, JobState.RUNNING, "")
    await queue.change_state(lease, JobState.FINALIZING, "")
    result = replace(RESULT, artifact_path=path, manifest_sha256=artefact.manifest_sha256, size_bytes=artefact.size_bytes)
    assert await queue.complete(lease, result)
    return path


def use_cases_database(queue: PostgresJobQueue) -> PostgresDatabase:
    return queue._database


async def make_versions(use_cases: UseCases, queue: PostgresJobQueue, *techniques: Technique) -> tuple[Model, list[str]]:
    """Store a model with a version for each technique; give the paths of their files."""
    database = use_cases_database(queue)
    model, paths = await add_model(database), []
    for technique in techniques:
        job = make_job(model)
        assert isinstance(job.spec, FineTuneSpec)
        async with database.transaction(ORGANIZATION) as transaction:
            await transaction.jobs.insert(replace(job, spec=replace(job.spec, technique=technique)))
        paths.append(await finish(use_cases, queue, (await claim(queue)).lease))
    return await read_model(database, model.model_id), paths


async def export(use_cases: UseCases, model: Model, version: int = 1, form: ExportFormat | None = None, **more: object) -> Job:
    request = ExportVersion(model.model_id, version, form, **more)  # type: ignore[arg-type]  # plain test data
    return await use_cases.versions.export(ORGANIZATION, request)


async def read(stream: AsyncGenerator[bytes, None]) -> bytes:
    return b"".join([piece async for piece in stream])


async def test_the_newest_version_serves_until_another_is_promoted(use_cases: UseCases, queue: PostgresJobQueue) -> None:
    model, _ = await make_versions(use_cases, queue, LoraTechnique(), FullTechnique(), LoraTechnique())
    listed = await use_cases.versions.list(ORGANIZATION, ListVersions(model.model_id, PageRequest(2)))
    assert [(shown.version.version, shown.serving) for shown in listed.items] == [(3, True), (2, False)]
    rest = await use_cases.versions.list(ORGANIZATION, ListVersions(model.model_id, PageRequest(2, listed.next_page_token)))
    assert ([shown.version.version for shown in rest.items], rest.next_page_token) == ([1], "")
    promoted = await use_cases.versions.promote(ORGANIZATION, model.model_id, 2)
    assert (promoted.serving_version, promoted.technique) == (2, "FULL")
    assert (await use_cases.versions.get(ORGANIZATION, model.model_id, 2)).serving
    assert (await use_cases.versions.promote(ORGANIZATION, model.model_id, 2)) == promoted
    assert (await use_cases.versions.promote(ORGANIZATION, model.model_id, 1)).technique == "LORA"
    with pytest.raises(NotFound):
        await use_cases.versions.promote(ORGANIZATION, model.model_id, 4)


@pytest.mark.parametrize("token", ["x", "IjEi", "W10"])
async def test_a_token_that_no_list_gave_is_refused(use_cases: UseCases, queue: PostgresJobQueue, token: str) -> None:
    model, _ = await make_versions(use_cases, queue)
    with pytest.raises(InvalidInput, match="page_token"):
        await use_cases.versions.list(ORGANIZATION, ListVersions(model.model_id, PageRequest(2, token)))


async def test_a_deleted_version_takes_its_files_and_exports(use_cases: UseCases, queue: PostgresJobQueue) -> None:
    model, (first, second) = await make_versions(use_cases, queue, LoraTechnique(), LoraTechnique())
    await export(use_cases, model)
    exported = await finish(use_cases, queue, (await claim(queue)).lease)
    await use_cases.versions.delete(ORGANIZATION, model.model_id, 1)
    assert [(use_cases.storage / path).exists() for path in (first, exported, second)] == [False, False, True]
    with pytest.raises(NotFound):
        await use_cases.versions.delete(ORGANIZATION, model.model_id, 1)


async def test_a_version_that_serves_or_is_in_use_is_not_deleted(use_cases: UseCases, queue: PostgresJobQueue) -> None:
    model, _ = await make_versions(use_cases, queue, LoraTechnique(), LoraTechnique())
    with pytest.raises(FailedPrecondition) as serving:
        await use_cases.versions.delete(ORGANIZATION, model.model_id, 2)
    job = await export(use_cases, model)
    with pytest.raises(FailedPrecondition) as exporting:
        await use_cases.versions.delete(ORGANIZATION, model.model_id, 1)
    assert (serving.value.data.reason, exporting.value.data.reason) == ("VERSION_SERVING", "VERSION_IN_USE")
    assert exporting.value.data.metadata["job_id"] == job.job_id
    await change_state(use_cases_database(queue), job.job_id, JobState.CANCELLED)
    await use_cases.versions.delete(ORGANIZATION, model.model_id, 1)


async def test_an_export_is_made_once_in_each_format(use_cases: UseCases, queue: PostgresJobQueue) -> None:
    model, _ = await make_versions(use_cases, queue, LoraTechnique())
    preview = await export(use_cases, model, validate_only=True)
    assert (preview.job_id, preview.kind, preview.spec) == ("", JobKind.EXPORT, ExportSpec(BASE_MODEL, 1, ExportFormat.ADAPTER))
    adapter = await export(use_cases, model)
    merged = await export(use_cases, model, form=ExportFormat.MERGED)
    assert (await export(use_cases, model, form=ExportFormat.ADAPTER)).job_id == adapter.job_id != merged.job_id
    await finish(use_cases, queue, (await claim(queue)).lease)
    done = await export(use_cases, model)
    assert (done.job_id, done.state) == (adapter.job_id, JobState.SUCCEEDED)
    await change_state(use_cases_database(queue), merged.job_id, JobState.CANCELLED)
    assert (await export(use_cases, model, form=ExportFormat.MERGED)).job_id not in (merged.job_id, adapter.job_id)


async def test_a_repeated_export_request_answers_with_its_first_job(use_cases: UseCases, queue: PostgresJobQueue) -> None:
    model, _ = await make_versions(use_cases, queue, LoraTechnique())
    first = await export(use_cases, model, request_id="r1")
    await change_state(use_cases_database(queue), first.job_id, JobState.CANCELLED)
    assert (await export(use_cases, model, request_id="r1")).job_id == first.job_id
    with pytest.raises(AlreadyExists):
        await export(use_cases, model, form=ExportFormat.MERGED, request_id="r1")
    with pytest.raises(InvalidInput, match="request_id"):
        await export(use_cases, model, request_id="r" * 129)


@pytest.mark.parametrize("technique", [PromptTuning(), PTuning(), PrefixTuning()])
def test_what_leaves_the_weights_as_they_are_cannot_be_merged(technique: Technique) -> None:
    assert resolve_format(None, technique) is ExportFormat.ADAPTER
    with pytest.raises(InvalidInput, match=f"{technique.kind} puts learned tokens before the prompt"):
        resolve_format(ExportFormat.MERGED, technique)


def test_a_fully_trained_version_is_a_whole_model_and_has_no_adapter() -> None:
    assert resolve_format(None, FullTechnique()) is ExportFormat.MERGED
    with pytest.raises(InvalidInput, match="no adapter"):
        resolve_format(ExportFormat.ADAPTER, FullTechnique())
    assert resolve_format(ExportFormat.MERGED, Ia3()) is ExportFormat.MERGED


async def test_files_come_from_the_version_or_from_the_export_that_is_named(use_cases: UseCases, queue: PostgresJobQueue) -> None:
    model, (path,) = await make_versions(use_cases, queue, LoraTechnique())
    own, exported = FilesOf(model.model_id, 1), FilesOf(model.model_id, 1, ExportFormat.ADAPTER)
    versions = use_cases.versions
    assert [file.path for file in await versions.list_files(ORGANIZATION, own)] == ["adapter_config.json", "manifest.json"]
    with pytest.raises(NotFound):
        await versions.list_files(ORGANIZATION, exported)
    await export(use_cases, model)
    made = await finish(use_cases, queue, (await claim(queue)).lease)
    texts = [(await read(versions.read_file(ORGANIZATION, wanted, "adapter_config.json"))).decode() for wanted in (own, exported)]
    assert texts == [f"{Path(name).name}.partial" for name in (path, made)]
    archives = [await read(versions.read_archive(ORGANIZATION, wanted)) for wanted in (own, exported)]
    assert archives[0].startswith(f"{model.model_id}-1/adapter_config.json".encode())
    assert archives[1].startswith(f"{model.model_id}-1-adapter/adapter_config.json".encode())
    with pytest.raises(NotFound):
        await read(versions.read_file("other", own, "adapter_config.json"))
    with pytest.raises(InvalidInput, match="path"):
        await read(versions.read_file(ORGANIZATION, own, ""))


async def test_a_warm_start_names_the_version_that_serves_now(use_cases: UseCases, queue: PostgresJobQueue) -> None:
    model, _ = await make_versions(use_cases, queue, LoraTechnique(rank=4), LoraTechnique(rank=8))
    dataset = await add_dataset(use_cases_database(queue))
    started = await use_cases.models.create_fine_tuned_model(
        ORGANIZATION,
        fine_tune(dataset.dataset_id, technique=LoraTechnique(rank=8, dropout=0.1), warm_start_from=VersionReference(model.model_id)),
    )
    assert started.job is not None
    assert isinstance(started.job.spec, FineTuneSpec)
    assert started.job.spec.warm_start_from == VersionReference(model.model_id, 2)
    await use_cases.versions.promote(ORGANIZATION, model.model_id, 1)
    with pytest.raises(FailedPrecondition, match=started.job.job_id):
        await use_cases.versions.delete(ORGANIZATION, model.model_id, 2)
    assert (await claim(queue)).version == (await use_cases.versions.get(ORGANIZATION, model.model_id, 2)).version


@pytest.mark.parametrize(
    ("technique", "said"),
    [
        (LoraTechnique(rank=16), "rank 4, not 16"),
        (LoraTechnique(rank=4, alpha=8), "alpha 32.0, not 8"),
        (LoraTechnique(rank=4, target_modules=("q_proj",)), "target_modules all-linear, not q_proj"),
        (QloraTechnique(LoraTechnique(rank=4)), "by lora, not by qlora"),
        (FullTechnique(), "by lora, not by full"),
    ],
)
async def test_a_warm_start_from_another_technique_or_shape_is_refused(
    use_cases: UseCases, queue: PostgresJobQueue, technique: Technique, said: str
) -> None:
    model, _ = await make_versions(use_cases, queue, LoraTechnique(rank=4))
    dataset = await add_dataset(use_cases_database(queue))
    request = fine_tune(dataset.dataset_id, technique=technique, warm_start_from=VersionReference(model.model_id, 1))
    with pytest.raises(InvalidInput, match=f"warm_start_from: was trained in another way, so its weights do not fit: {said}"):
        await use_cases.models.create_fine_tuned_model(ORGANIZATION, request)


async def test_a_warm_start_from_what_is_not_there_or_of_another_base_is_refused(use_cases: UseCases, queue: PostgresJobQueue) -> None:
    database = use_cases_database(queue)
    model, _ = await make_versions(use_cases, queue, LoraTechnique())
    empty, dataset = await add_model(database), await add_dataset(database)

    async def refuse(start: VersionReference) -> str:
        with pytest.raises(InvalidInput) as refusal:
            await use_cases.models.create_fine_tuned_model(ORGANIZATION, fine_tune(dataset.dataset_id, warm_start_from=start))
        return refusal.value.data.violations[0].field

    assert await refuse(VersionReference("")) == "warm_start_from.model_id"
    assert await refuse(VersionReference("mdl_x")) == "warm_start_from.model_id"
    assert await refuse(VersionReference(empty.model_id)) == "warm_start_from.model_id"
    assert await refuse(VersionReference(model.model_id, 7)) == "warm_start_from.version"
    async with database.transaction(ORGANIZATION) as transaction:
        other = replace(model, model_id=new_id(MODEL), base_model="org/other", serving_version=None)
        await transaction.models.insert(other)
        job = make_job(other)
        await transaction.jobs.insert(job)
    await finish(use_cases, queue, (await claim(queue)).lease)
    assert await refuse(VersionReference(other.model_id)) == "warm_start_from"
