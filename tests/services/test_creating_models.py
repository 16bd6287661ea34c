"""Creating, changing and deleting models: every bad field at once, the same request once only, nothing in use lost."""

import math
from dataclasses import replace

import pytest

from server.domain.documents import NewDocument
from server.domain.embeddings import EmbeddingBackend
from server.domain.errors import AlreadyExists, FailedPrecondition, InvalidInput, NotFound
from server.domain.jobs import JobState
from server.domain.models import ModelState
from server.domain.retrieval import Rerank, RetrievalOverrides
from server.domain.specs import FineTuneSpec, IndexSpec, Objective, ParametersRequest
from server.domain.techniques import LoraTechnique, QloraTechnique
from server.services.ports import JobFilter, ModelFilter
from server.services.requests import AddDocuments, CreateRagModel, ListJobs, ListModels, PageRequest, UpdateModel
from tests.services.conftest import BASE_MODEL, EMBEDDING_MODEL, GOOD_LINE, ORGANIZATION, UseCases, fine_tune
from tests.tiny_cross_encoders import build_tiny_cross_encoder

INLINE = {"inline_records": [GOOD_LINE.strip()]}


def rag(**changes: object) -> CreateRagModel:
    values: dict[str, object] = {
        "display_name": "r",
        "generator_model_id": BASE_MODEL,
        "embedding_model": EMBEDDING_MODEL,
        "retrieval": RetrievalOverrides(),
        "documents": [NewDocument("Some text.", "Title")],
    }
    return CreateRagModel(**{**values, **changes})  # type: ignore[arg-type]  # plain test data


def fields_of(error: InvalidInput) -> list[str]:
    return sorted(violation.field for violation in error.data.violations)


async def test_a_fine_tuning_is_stored_with_everything_that_was_left_out_filled_in(use_cases: UseCases) -> None:
    made = await use_cases.models.create_fine_tuned_model(ORGANIZATION, fine_tune(**INLINE))
    assert made.job is not None
    assert (made.model.state, made.job.state, made.job.queue_position) == (ModelState.CREATING, JobState.QUEUED, 1)
    spec = made.job.spec
    assert isinstance(spec, FineTuneSpec)
    assert (spec.parameters.batch_size, spec.parameters.learning_rate, spec.technique) == (16, 1e-3, LoraTechnique())
    dataset = await use_cases.datasets.get(ORGANIZATION, spec.dataset_id)
    assert (dataset.record_count, dataset.sha256) == (1, spec.dataset_sha256)


async def test_every_bad_field_of_a_fine_tuning_is_named_at_once(use_cases: UseCases) -> None:
    request = fine_tune(
        "ds_unknown", display_name="x" * 201, base_model="unknown", model_id="mdl_../../etc", eval_fraction=0.9,
        technique=LoraTechnique(rank=0, dropout=1.0), parameters=ParametersRequest(learning_rate=math.nan, epochs=1e9), labels={"": "x"},
    )  # fmt: skip
    with pytest.raises(InvalidInput) as refusal:
        await use_cases.models.create_fine_tuned_model(ORGANIZATION, request)
    assert fields_of(refusal.value) == sorted(
        ["display_name", "base_model", "model_id", "dataset_id", "eval_fraction", "labels['']", "lora.rank", "lora.dropout",
         "parameters.learning_rate", "parameters.epochs"]
    )  # fmt: skip


@pytest.mark.parametrize("changes", [{}, {"dataset_id": "ds_x", **INLINE}])
async def test_records_come_in_exactly_one_way(use_cases: UseCases, changes: dict[str, object]) -> None:
    with pytest.raises(InvalidInput, match="exactly one of dataset_id and inline_records"):
        await use_cases.models.create_fine_tuned_model(ORGANIZATION, fine_tune(**changes))


async def test_a_bad_inline_record_is_named_by_its_place(use_cases: UseCases) -> None:
    with pytest.raises(InvalidInput) as refusal:
        await use_cases.models.create_fine_tuned_model(ORGANIZATION, fine_tune(inline_records=[GOOD_LINE, b'{"messages": []}']))
    assert fields_of(refusal.value) == ["inline_records[1]"]


async def test_layers_that_the_base_model_has_not_are_named(use_cases: UseCases) -> None:
    asked = QloraTechnique(LoraTechnique(target_modules=("q_proj", "model.layers.0.mlp.up_proj", "lm_head", "r_proj")))
    with pytest.raises(InvalidInput, match=r"choose of q_proj, k_proj, .*all-linear") as refusal:
        await use_cases.models.create_fine_tuned_model(ORGANIZATION, fine_tune(technique=asked, **INLINE))
    assert fields_of(refusal.value) == ["qlora.lora.target_modules[3]"]


PAIR = b'{"prompt": "a", "chosen": "b", "rejected": "c"}'


@pytest.mark.parametrize(("objective", "line"), [(Objective.DPO, GOOD_LINE), (Objective.ORPO, GOOD_LINE), (Objective.SUPERVISED, PAIR)])
async def test_an_objective_that_cannot_learn_from_the_records_is_refused(use_cases: UseCases, objective: Objective, line: bytes) -> None:
    with pytest.raises(InvalidInput, match=f"{objective} learns from .*; the records are of kind") as refusal:
        await use_cases.models.create_fine_tuned_model(
            ORGANIZATION, fine_tune(inline_records=[line], parameters=ParametersRequest(objective=objective))
        )
    assert fields_of(refusal.value) == ["parameters.objective"]


async def test_a_rag_model_embeds_in_the_numbers_that_it_was_made_with(use_cases: UseCases) -> None:
    plain = await use_cases.models.create_rag_model(ORGANIZATION, rag())
    half = await use_cases.models.create_rag_model(ORGANIZATION, rag(embedding_backend=EmbeddingBackend.BFLOAT16))
    backends = []
    for made in (plain, half):
        assert made.model.rag is not None
        assert made.job is not None
        assert isinstance(made.job.spec, IndexSpec)
        backends += [(made.model.rag.embedding_backend, made.job.spec.embedding_backend)]
    assert backends == [(EmbeddingBackend.FLOAT32,) * 2, (EmbeddingBackend.BFLOAT16,) * 2]


async def test_a_model_that_needs_farasa_is_refused_for_that_though_it_cannot_be_had_either(use_cases: UseCases) -> None:
    with pytest.raises(InvalidInput) as refusal:
        await use_cases.models.create_rag_model(ORGANIZATION, rag(embedding_model="aubmindlab/bert-base-arabertv2"))
    assert fields_of(refusal.value) == ["embedding_model"]
    assert "Farasa" in refusal.value.data.violations[0].description


@pytest.mark.parametrize(
    ("asked", "field"),
    [
        (RetrievalOverrides(rerank=Rerank("/nowhere")), "retrieval.rerank.model"),
        (RetrievalOverrides(rerank=Rerank(EMBEDDING_MODEL)), "retrieval.rerank.model"),
        (RetrievalOverrides(rerank=Rerank("cross-encoder/ms-marco-MiniLM-L6-v2")), "retrieval.rerank.model"),
        (RetrievalOverrides(rerank=Rerank("", candidates=1_001)), "retrieval.rerank.candidates"),
        (RetrievalOverrides(rerank=Rerank("", timeout_seconds=0.0)), "retrieval.rerank.timeout_seconds"),
        (RetrievalOverrides(rerank=Rerank("", timeout_seconds=math.nan)), "retrieval.rerank.timeout_seconds"),
    ],
)
async def test_a_reranking_that_cannot_be_is_refused_at_creation_and_change(
    use_cases: UseCases, asked: RetrievalOverrides, field: str
) -> None:
    with pytest.raises(InvalidInput) as refusal:
        await use_cases.models.create_rag_model(ORGANIZATION, rag(retrieval=asked))
    assert fields_of(refusal.value) == [field]
    made = await use_cases.models.create_rag_model(ORGANIZATION, rag())
    with pytest.raises(InvalidInput) as refusal:
        await use_cases.models.update_model(ORGANIZATION, UpdateModel(made.model.model_id, retrieval=asked))
    assert fields_of(refusal.value) == [field]


async def test_fewer_candidates_than_answers_are_refused_whichever_is_changed(use_cases: UseCases) -> None:
    model = str(build_tiny_cross_encoder(use_cases.local_models / "ranks"))
    few = RetrievalOverrides(top_k=20, rerank=Rerank(model, candidates=19))
    with pytest.raises(InvalidInput, match=r"retrieval\.rerank\.candidates: must be at least top_k, which is 20, not 19"):
        await use_cases.models.create_rag_model(ORGANIZATION, rag(retrieval=few))
    made = await use_cases.models.create_rag_model(ORGANIZATION, rag(retrieval=replace(few, top_k=19)))
    assert made.model.rag is not None
    assert made.model.rag.retrieval.rerank == Rerank(model, candidates=19)
    with pytest.raises(InvalidInput, match="must be at least top_k"):
        await use_cases.models.update_model(ORGANIZATION, UpdateModel(made.model.model_id, retrieval=RetrievalOverrides(top_k=20)))
    off = UpdateModel(made.model.model_id, retrieval=RetrievalOverrides(top_k=20, rerank=Rerank("")))
    changed = await use_cases.models.update_model(ORGANIZATION, off)
    assert changed.rag is not None
    assert changed.rag.retrieval.rerank is None


async def test_the_same_request_again_makes_nothing_new(use_cases: UseCases) -> None:
    request = fine_tune(request_id="r", **INLINE)
    first = await use_cases.models.create_fine_tuned_model(ORGANIZATION, request)
    again = await use_cases.models.create_fine_tuned_model(ORGANIZATION, request)
    assert again.model.model_id == first.model.model_id
    listed = await use_cases.models.list_models(ORGANIZATION, ListModels(ModelFilter(), PageRequest()))
    assert len(listed.items) == 1
    with pytest.raises(AlreadyExists):
        await use_cases.models.create_fine_tuned_model(ORGANIZATION, fine_tune(request_id="r", display_name="other", **INLINE))


@pytest.mark.parametrize("kind", ["fine_tune", "rag"])
async def test_validating_only_makes_nothing(use_cases: UseCases, kind: str) -> None:
    if kind == "rag":
        made = await use_cases.models.create_rag_model(ORGANIZATION, rag(validate_only=True))
    else:
        made = await use_cases.models.create_fine_tuned_model(ORGANIZATION, fine_tune(validate_only=True, **INLINE))
    assert made.job is not None
    assert (made.model.model_id, made.job.job_id) == ("", "")
    assert (await use_cases.models.list_models(ORGANIZATION, ListModels(ModelFilter(), PageRequest()))).items == []
    assert (await use_cases.training.list_jobs(ORGANIZATION, ListJobs(JobFilter(), PageRequest()))).items == []
    assert not use_cases.storage.exists()


async def test_a_rag_model_is_stored_with_its_documents_and_its_job(use_cases: UseCases) -> None:
    made = await use_cases.models.create_rag_model(ORGANIZATION, rag(max_chunk_tokens=64))
    assert made.job is not None
    assert (made.model.document_count, made.model.chunk_count, made.model.state) == (1, 0, ModelState.CREATING)
    assert isinstance(made.job.spec, IndexSpec)
    assert (made.job.spec.embedding_model, made.job.spec.chunking.max_tokens) == (EMBEDDING_MODEL, 64)


async def test_every_bad_field_of_a_rag_model_is_named_at_once(use_cases: UseCases) -> None:
    request = rag(
        display_name=" ", generator_model_id="mdl_none", embedding_model="none",
        retrieval=RetrievalOverrides(top_k=0, similarity_threshold=2), max_chunk_tokens=-1,
        documents=[NewDocument("\0")], prompt_template="{other}",
    )  # fmt: skip
    with pytest.raises(InvalidInput) as refusal:
        await use_cases.models.create_rag_model(ORGANIZATION, request)
    assert fields_of(refusal.value) == sorted(
        ["display_name", "generator_model_id", "embedding_model", "retrieval.top_k", "retrieval.similarity_threshold",
         "chunking.max_tokens", "documents[0].text", "prompt_template"]
    )  # fmt: skip


async def test_a_chunk_longer_than_the_embedding_model_reads_is_refused(use_cases: UseCases) -> None:
    with pytest.raises(InvalidInput, match=r"chunking.max_tokens: must be from 16 to 256"):
        await use_cases.models.create_rag_model(ORGANIZATION, rag(max_chunk_tokens=257))


async def test_a_model_that_is_not_ready_generates_for_no_rag_model(use_cases: UseCases) -> None:
    made = await use_cases.models.create_fine_tuned_model(ORGANIZATION, fine_tune(**INLINE))
    with pytest.raises(InvalidInput, match="READY"):
        await use_cases.models.create_rag_model(ORGANIZATION, rag(generator_model_id=made.model.model_id))


async def test_documents_can_be_added_listed_and_deleted(use_cases: UseCases) -> None:
    model = (await use_cases.models.create_rag_model(ORGANIZATION, rag())).model
    request = AddDocuments(model.model_id, [NewDocument("More.", metadata={"year": 2026})], request_id="a")
    documents, job = await use_cases.models.documents.add(ORGANIZATION, request)
    again, same = await use_cases.models.documents.add(ORGANIZATION, request)
    assert job is not None
    assert (again, same) == (documents, job)
    read = await use_cases.models.documents.get(ORGANIZATION, model.model_id, documents[0].document_id)
    assert read.metadata == {"year": 2026}
    await use_cases.models.documents.delete(ORGANIZATION, model.model_id, read.document_id)
    with pytest.raises(NotFound):
        await use_cases.models.documents.get(ORGANIZATION, model.model_id, read.document_id)
    assert (await use_cases.models.get_model(ORGANIZATION, model.model_id)).document_count == 1


async def test_only_rag_models_take_documents(use_cases: UseCases) -> None:
    made = await use_cases.models.create_fine_tuned_model(ORGANIZATION, fine_tune(**INLINE))
    with pytest.raises(FailedPrecondition, match="RAG"):
        await use_cases.models.documents.add(ORGANIZATION, AddDocuments(made.model.model_id, [NewDocument("x")]))


async def test_a_model_in_use_is_not_deleted(use_cases: UseCases) -> None:
    made = await use_cases.models.create_fine_tuned_model(ORGANIZATION, fine_tune(**INLINE))
    assert made.job is not None
    with pytest.raises(FailedPrecondition, match=made.job.job_id):
        await use_cases.models.delete_model(ORGANIZATION, made.model.model_id)
    await use_cases.training.control.cancel(ORGANIZATION, made.job.job_id)
    await use_cases.models.delete_model(ORGANIZATION, made.model.model_id)
    with pytest.raises(NotFound):
        await use_cases.models.get_model(ORGANIZATION, made.model.model_id)


async def test_what_is_not_named_in_an_update_stays(use_cases: UseCases) -> None:
    model = (await use_cases.models.create_rag_model(ORGANIZATION, rag(labels={"a": "1", "b": "2"}))).model
    request = UpdateModel(model.model_id, description="d", labels={"a": "", "c": "3"}, retrieval=RetrievalOverrides(top_k=9))
    changed = await use_cases.models.update_model(ORGANIZATION, request)
    assert (changed.display_name, changed.description, changed.labels) == ("r", "d", {"b": "2", "c": "3"})
    assert changed.rag is not None
    assert (changed.rag.retrieval.top_k, changed.rag.retrieval.similarity_threshold) == (9, 0.3)


async def test_the_prompt_template_is_checked_and_changed(use_cases: UseCases) -> None:
    bad = "{context}{% for x in range(999999999) %}{% endfor %}"
    with pytest.raises(InvalidInput, match="loop over sources or history") as refusal:
        await use_cases.models.create_rag_model(ORGANIZATION, rag(prompt_template=bad))
    assert set(fields_of(refusal.value)) == {"prompt_template"}
    model = (await use_cases.models.create_rag_model(ORGANIZATION, rag(prompt_template="{context} {question}"))).model
    with pytest.raises(InvalidInput, match=r"prompt_template: knows no variable \{secret\}"):
        await use_cases.models.update_model(ORGANIZATION, UpdateModel(model.model_id, prompt_template="{context} {question} {secret}"))
    kept = await use_cases.models.update_model(ORGANIZATION, UpdateModel(model.model_id, description="d"))
    assert kept.rag is not None
    assert kept.rag.prompt_template == "{context} {question}"
    for template in ("Q: {{ question }} {% for s in sources %}{{ s.text }}{% endfor %}", ""):
        changed = await use_cases.models.update_model(ORGANIZATION, UpdateModel(model.model_id, prompt_template=template))
        assert changed.rag is not None
        assert changed.rag.prompt_template == template
    tuned = (await use_cases.models.create_fine_tuned_model(ORGANIZATION, fine_tune(**INLINE))).model
    with pytest.raises(InvalidInput, match="RAG models only"):
        await use_cases.models.update_model(ORGANIZATION, UpdateModel(tuned.model_id, prompt_template=""))


async def test_cancelling_twice_is_harmless(use_cases: UseCases) -> None:
    made = await use_cases.models.create_fine_tuned_model(ORGANIZATION, fine_tune(**INLINE))
    assert made.job is not None
    states = [(await use_cases.training.control.cancel(ORGANIZATION, made.job.job_id)).state for _ in range(2)]
    assert states == [JobState.CANCELLED] * 2
    model = await use_cases.models.get_model(ORGANIZATION, made.model.model_id)
    assert (model.state, model.error and model.error.reason) == (ModelState.FAILED, "JOB_CANCELLED")


async def test_the_catalogue_comes_in_pages_and_says_what_is_here(use_cases: UseCases) -> None:
    first = use_cases.models.list_base_models(PageRequest(2))
    second = use_cases.models.list_base_models(PageRequest(1000, first.next_page_token))
    listed = [*first.items, *second.items]
    names = [model.base_model_id for model, _ in listed]
    assert len(set(names)) == len(names)
    assert dict(zip(names, [here for _, here in listed], strict=True))[BASE_MODEL]
    assert sum(here for _, here in listed) == 1


async def test_pairs_in_the_request_are_learnt_as_preferences(use_cases: UseCases) -> None:
    pair = b'{"prompt": "Who?", "chosen": " the bridge", "rejected": " the river"}'
    created = await use_cases.models.create_fine_tuned_model(ORGANIZATION, fine_tune(inline_records=[pair], validate_only=True))
    assert created.job is not None
    assert isinstance(created.job.spec, FineTuneSpec)
    assert created.job.spec.parameters.objective is Objective.DPO
