"""Building an index anew: what is refused, what is filled in, once per request, one at a time, and again after a failure."""

from dataclasses import replace

import pytest

from server.db.database import PostgresDatabase
from server.domain.documents import NewDocument
from server.domain.errors import AlreadyExists, FailedPrecondition, InvalidInput, NotFound
from server.domain.ids import MODEL, new_id
from server.domain.jobs import JobState
from server.domain.models import Model, ModelState
from server.domain.retrieval import Chunking, RetrievalOverrides
from server.domain.specs import IndexSpec
from server.services.requests import AddDocuments, CreateRagModel, ReindexModel, UpdateModel
from tests.services.conftest import BASE_MODEL, EMBEDDING_MODEL, GOOD_LINE, ORGANIZATION, UseCases, fine_tune


async def add_rag_model(use_cases: UseCases, database: PostgresDatabase) -> Model:
    """A READY RAG model, with no job at work."""
    request = CreateRagModel("r", BASE_MODEL, EMBEDDING_MODEL, RetrievalOverrides(), max_chunk_tokens=128, overlap_tokens=16)
    made = await use_cases.models.create_rag_model(ORGANIZATION, request)
    assert made.job is not None
    await use_cases.training.control.cancel(ORGANIZATION, made.job.job_id)
    async with database.transaction(ORGANIZATION) as transaction:
        await transaction.models.save(replace(made.model, state=ModelState.READY, error=None))
        return await transaction.models.get(made.model.model_id)


async def test_what_is_left_out_stays_as_it_is(use_cases: UseCases, database: PostgresDatabase) -> None:
    model = await add_rag_model(use_cases, database)
    made = await use_cases.models.reindex_model(ORGANIZATION, ReindexModel(model.model_id, max_chunk_tokens=64))
    assert made.job.spec == IndexSpec(EMBEDDING_MODEL, Chunking(64, 16), 2, is_reindex=True)
    assert made.job.state is JobState.QUEUED
    unchanged = await use_cases.models.get_model(ORGANIZATION, model.model_id)
    assert unchanged == model


async def test_only_one_index_is_built_at_a_time(use_cases: UseCases, database: PostgresDatabase) -> None:
    model = await add_rag_model(use_cases, database)
    first = await use_cases.models.reindex_model(ORGANIZATION, ReindexModel(model.model_id))
    for trial in (False, True):
        with pytest.raises(FailedPrecondition, match=first.job.job_id) as refusal:
            await use_cases.models.reindex_model(ORGANIZATION, ReindexModel(model.model_id, validate_only=trial))
        assert refusal.value.reason == "REINDEX_RUNNING"
    await use_cases.training.control.cancel(ORGANIZATION, first.job.job_id)
    assert (await use_cases.models.get_model(ORGANIZATION, model.model_id)).state is ModelState.READY
    second = await use_cases.models.reindex_model(ORGANIZATION, ReindexModel(model.model_id))
    with pytest.raises(FailedPrecondition) as refusal:
        await use_cases.training.control.retry(ORGANIZATION, first.job.job_id)
    assert refusal.value.reason == "REINDEX_RUNNING"
    await use_cases.training.control.cancel(ORGANIZATION, second.job.job_id)
    again = await use_cases.training.control.retry(ORGANIZATION, first.job.job_id)
    assert isinstance(again.spec, IndexSpec)
    # What the first one had built may be half removed by now.
    assert again.spec.is_reindex
    assert again.spec.index_number == 4


async def test_a_retry_of_added_documents_goes_to_the_index_that_answers(use_cases: UseCases, database: PostgresDatabase) -> None:
    model = await add_rag_model(use_cases, database)
    _, job = await use_cases.models.documents.add(ORGANIZATION, AddDocuments(model.model_id, [NewDocument("Some text.")]))
    assert job is not None
    await use_cases.training.control.cancel(ORGANIZATION, job.job_id)
    async with database.transaction(ORGANIZATION) as transaction:
        stored = await transaction.models.get(model.model_id, lock=True)
        assert stored.rag is not None
        await transaction.models.save(replace(stored, rag=replace(stored.rag, chunking=Chunking(32, 4))))
    again = await use_cases.training.control.retry(ORGANIZATION, job.job_id)
    assert again.spec == IndexSpec(EMBEDDING_MODEL, Chunking(32, 4), 1)


async def test_the_same_request_starts_one_job(use_cases: UseCases, database: PostgresDatabase) -> None:
    model = await add_rag_model(use_cases, database)
    request = ReindexModel(model.model_id, overlap_tokens=8, request_id="r-1")
    first = await use_cases.models.reindex_model(ORGANIZATION, request)
    assert await use_cases.models.reindex_model(ORGANIZATION, request) == first
    with pytest.raises(AlreadyExists):
        await use_cases.models.reindex_model(ORGANIZATION, replace(request, overlap_tokens=9))


async def test_a_trial_starts_nothing(use_cases: UseCases, database: PostgresDatabase) -> None:
    model = await add_rag_model(use_cases, database)
    trial = await use_cases.models.reindex_model(ORGANIZATION, ReindexModel(model.model_id, validate_only=True))
    assert trial.job.job_id == ""
    made = await use_cases.models.reindex_model(ORGANIZATION, ReindexModel(model.model_id))
    assert isinstance(made.job.spec, IndexSpec)
    assert made.job.spec.index_number == 2


async def test_a_model_that_was_never_tuned_for_retrieval_is_warned_of(use_cases: UseCases, database: PostgresDatabase) -> None:
    model = await add_rag_model(use_cases, database)
    snapshot = use_cases.storage.parent / "cache/hub/models--aubmindlab--bert-base-arabertv02/snapshots" / ("c" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    request = ReindexModel(model.model_id, "aubmindlab/bert-base-arabertv02", validate_only=True)
    assert [finding.code for finding in (await use_cases.models.reindex_model(ORGANIZATION, request)).findings] == [
        "EMBEDDING_MODEL_NOT_TUNED"
    ]


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"embedding_model": "/nowhere"}, "embedding_model"),
        ({"embedding_model": "no such thing"}, "embedding_model"),
        ({"max_chunk_tokens": 1, "overlap_tokens": 0}, "chunking.max_tokens"),
        ({"max_chunk_tokens": 10_000}, "chunking.max_tokens"),
        ({"overlap_tokens": 65}, "chunking.overlap_tokens"),
        ({"max_chunk_tokens": 24}, "chunking.overlap_tokens"),
        ({"request_id": "x" * 129}, "request_id"),
    ],
)
async def test_a_bad_field_is_named(use_cases: UseCases, database: PostgresDatabase, changes: dict[str, object], field: str) -> None:
    model = await add_rag_model(use_cases, database)
    with pytest.raises(InvalidInput) as refusal:
        await use_cases.models.reindex_model(ORGANIZATION, ReindexModel(model.model_id, **changes))  # type: ignore[arg-type]  # test data
    assert [violation.field for violation in refusal.value.data.violations] == [field]


async def test_only_a_rag_model_that_answers_is_indexed_anew(use_cases: UseCases) -> None:
    with pytest.raises(NotFound):
        await use_cases.models.reindex_model(ORGANIZATION, ReindexModel(new_id(MODEL)))
    tuned = await use_cases.models.create_fine_tuned_model(ORGANIZATION, fine_tune(inline_records=[GOOD_LINE.strip()]))
    rag = await use_cases.models.create_rag_model(
        ORGANIZATION, CreateRagModel("r", BASE_MODEL, EMBEDDING_MODEL, RetrievalOverrides(), documents=[NewDocument("Some text.")])
    )
    for model, reason in ((tuned.model, "NOT_A_RAG_MODEL"), (rag.model, "MODEL_NOT_READY")):
        with pytest.raises(FailedPrecondition) as refusal:
            await use_cases.models.reindex_model(ORGANIZATION, ReindexModel(model.model_id))
        assert refusal.value.reason == reason


async def test_a_percentile_and_a_threshold_take_each_others_place(use_cases: UseCases, database: PostgresDatabase) -> None:
    model = await add_rag_model(use_cases, database)

    async def update(**changes: float) -> tuple[float | None, float]:
        changed = await use_cases.models.update_model(ORGANIZATION, UpdateModel(model.model_id, retrieval=RetrievalOverrides(**changes)))  # type: ignore[arg-type]
        assert changed.rag is not None
        return changed.rag.retrieval.similarity_percentile, changed.rag.retrieval.similarity_threshold

    assert (await update(similarity_percentile=95.0))[0] == 95
    assert (await update(top_k=3))[0] == 95
    assert await update(similarity_threshold=0.4) == (None, 0.4)
    for bad in ({"similarity_percentile": 101.0}, {"similarity_percentile": 95.0, "similarity_threshold": 0.2}):
        with pytest.raises(InvalidInput) as refusal:
            await update(**bad)
        assert [violation.field for violation in refusal.value.data.violations] == ["retrieval.similarity_percentile"]
