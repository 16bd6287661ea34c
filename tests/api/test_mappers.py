"""What comes in and what goes out: nothing is lost, nothing left out is invented, nothing that is not built yet passes silently."""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta, timezone
from enum import StrEnum
from typing import Any, get_args

import pytest
from google.protobuf import json_format
from modeltraining.v1 import (
    dataset_pb2,
    document_pb2,
    embedding_model_pb2,
    fine_tuning_pb2,
    generation_pb2,
    inference_service_pb2,
    message_pb2,
    model_pb2,
    model_service_pb2,
    retrieval_pb2,
    training_job_pb2,
    training_service_pb2,
)

from server.api.mappers import (
    catalogue,
    datasets,
    documents,
    embedding,
    events,
    fine_tuning,
    generation,
    jobs,
    models,
    rag,
    rag_indexes,
    retrieval,
    techniques,
)
from server.api.mappers.values import enum_from_proto, enum_to_proto, time_to_proto
from server.domain.base_models import BASE_MODELS
from server.domain.catalogue import EMBEDDING_MODELS, Pooling
from server.domain.datasets import DatasetFormat, RecordKind
from server.domain.documents import DocumentState
from server.domain.embeddings import EmbeddingBackend
from server.domain.errors import ErrorData
from server.domain.events import (
    BatchAdvanced,
    CheckpointSaved,
    DataChecked,
    Evaluated,
    IndexAdvanced,
    IndexProgress,
    JobEvent,
    LengthBucket,
    LoggedPayload,
    Preparing,
    Sampled,
    Started,
    StateChanged,
    StepDone,
    Warned,
)
from server.domain.findings import Finding
from server.domain.generation import FinishReason, GenerationParameters, HistoryPolicy, Role
from server.domain.jobs import BatchCounters, IndexCounters, JobKind, JobState
from server.domain.models import ModelState, ModelType
from server.domain.record_forms import parse_record
from server.domain.records import RecordInvalid
from server.domain.retrieval import (
    Chunking,
    MetadataCondition,
    MetadataValue,
    Rerank,
    RerankFailure,
    RerankOutcome,
    RetrievalOverrides,
    RetrievalSettings,
    SearchMode,
)
from server.domain.specs import BatchSpec, EarlyStopping, IndexSpec, LossOn, Objective, OverlongPolicy, ParametersRequest, Scheduler
from server.services.rag_models import merge_retrieval
from server.services.reindexing import Reindexed
from server.services.requests import ReindexModel
from server.services.retrieval import RetrievalTimings, Retrieved
from server.services.validation import Violations
from server.services.watching import CoalescedStep, Finished, Heartbeat, Snapshot, WatchItem
from tests.api.samples import DOCUMENT, FINE_TUNE, INDEX, JOB, MODEL, RAG_ANSWER, RAG_MODEL, TIME

Parameters = fine_tuning_pb2.TrainingParameters
ENUMS: Sequence[tuple[Any, str, type[StrEnum]]] = [
    (training_job_pb2.TrainingJob.State, "STATE", JobState),
    (training_job_pb2.TrainingJob.Kind, "KIND", JobKind),
    (model_pb2.Model.State, "STATE", ModelState),
    (model_pb2.Model.Type, "TYPE", ModelType),
    (document_pb2.Document.State, "STATE", DocumentState),
    (dataset_pb2.Dataset.Format, "FORMAT", DatasetFormat),
    (dataset_pb2.Dataset.RecordKind, "RECORD_KIND", RecordKind),
    (retrieval_pb2.RetrievalConfig.SearchMode, "SEARCH_MODE", SearchMode),
    (Parameters.Scheduler, "SCHEDULER", Scheduler),
    (Parameters.OverlongPolicy, "OVERLONG_POLICY", OverlongPolicy),
    (Parameters.LossOn, "LOSS_ON", LossOn),
    (inference_service_pb2.GenerateResponse.FinishReason, "FINISH_REASON", FinishReason),
    (embedding_model_pb2.EmbeddingModel.Pooling, "POOLING", Pooling),
    (embedding_model_pb2.EmbeddingModel.Backend, "BACKEND", EmbeddingBackend),
]


def named(found: Violations) -> list[str]:
    return [violation.field for violation in found.found]


@pytest.mark.parametrize(("kind", "prefix", "member"), ENUMS)
def test_every_value_of_an_enum_goes_out_and_comes_back(kind: Any, prefix: str, member: type[StrEnum]) -> None:
    found = Violations()
    for value in member:
        assert enum_from_proto(kind, prefix, enum_to_proto(kind, prefix, value), member, found, "x") is value
    assert enum_from_proto(kind, prefix, 0, member, found, "x") is None
    assert named(found) == []


def test_an_unknown_or_unbuilt_value_is_named() -> None:
    found = Violations()
    enum_from_proto(training_job_pb2.TrainingJob.State, "STATE", training_job_pb2.TrainingJob.State.ValueType(99), JobState, found, "state")
    # A member of the contract that the domain does not have, as one that is promised and not built would be.
    enum_from_proto(dataset_pb2.Dataset.Format, "FORMAT", dataset_pb2.Dataset.FORMAT_PARQUET, SearchMode, found, "format")
    assert named(found) == ["state", "format"]


def test_a_time_is_written_in_utc() -> None:
    stamp = time_to_proto(datetime(2026, 1, 1, 3, tzinfo=timezone(timedelta(hours=3))))
    assert stamp is not None
    assert stamp.ToJsonString() == "2026-01-01T00:00:00Z"
    assert time_to_proto(None) is None


def test_what_a_caller_left_out_stays_left_out() -> None:
    found = Violations()
    empty = models.create_fine_tuned_from_proto(model_service_pb2.CreateFineTunedModelRequest(), found)
    assert (empty.technique, empty.parameters, empty.eval_fraction) == (None, ParametersRequest(), None)
    assert retrieval.overrides_from_proto(retrieval_pb2.RetrievalConfig(), found) == RetrievalOverrides()
    varied = retrieval_pb2.RetrievalConfig(max_chunks_per_document=0, mmr_lambda=0.0)
    assert retrieval.overrides_from_proto(varied, found) == RetrievalOverrides(max_chunks_per_document=0, mmr_lambda=0.0)
    generate = generation.generate_from_proto(inference_service_pb2.GenerateRequest(), found)
    assert (generate.prompt, generate.version, generate.parameters) == (None, None, GenerationParameters())
    update = models.update_model_from_proto(model_service_pb2.UpdateModelRequest(), found)
    assert (update.display_name, update.description, update.retrieval, update.prompt_template) == (None, None, None, None)
    cleared = models.update_model_from_proto(model_service_pb2.UpdateModelRequest(prompt_template=""), found)
    assert cleared.prompt_template == ""
    listed = jobs.list_jobs_from_proto(training_service_pb2.ListTrainingJobsRequest(), found)
    assert (listed.where.state, listed.where.kind, listed.where.model_id, listed.page.page_size) == (None, None, None, None)
    assert named(found) == []


def test_zero_is_not_the_same_as_left_out() -> None:
    zeros = generation_pb2.GenerationParameters(temperature=0, top_p=0, max_tokens=0, seed=0, logprobs=0)
    parameters = generation.parameters_from_proto(zeros)
    assert (parameters.temperature, parameters.top_p, parameters.max_tokens, parameters.seed, parameters.logprobs) == (0, 0, 0, 0, 0)
    asked = fine_tuning.parameters_from_proto(Parameters(epochs=0, warmup_ratio=0, seed=0), Violations())
    assert asked == ParametersRequest(epochs=0, warmup_ratio=0, seed=0)


def test_a_batch_is_shown_as_it_was_asked_for() -> None:
    said = {
        "max_tokens": 5, "temperature": 0.5, "top_p": 0.9, "top_k": 3, "min_p": 0.1, "repetition_penalty": 1.5, "presence_penalty": 0.5,
        "frequency_penalty": 0.25, "stop": ["x"], "seed": 7, "logprobs": 2, "n": 2, "stop_token_ids": [4], "logit_bias": {"9": -1.0},
        "constraint": {"regex": "[a-z]+"},
    }  # fmt: skip
    body = {"model_id": "mdl_1", "version": 3, "dataset_id": "ds_1", "parameters": said, "history": "HISTORY_POLICY_DROP_OLDEST"}
    found = Violations()
    asked = generation.batch_from_proto(json_format.ParseDict(body, inference_service_pb2.CreateBatchGenerationRequest()), found)
    assert (asked.model_id, asked.version, asked.dataset_id, named(found)) == ("mdl_1", 3, "ds_1", [])
    spec = BatchSpec("org/base", asked.version, asked.dataset_id, "ab", asked.parameters, asked.history)
    config = jobs.spec_to_proto(spec).batch_generation
    assert json_format.MessageToDict(config, preserving_proto_field_name=True) == {
        "base_model": "org/base", "dataset_sha256": "ab", **{name: body[name] for name in body if name != "model_id"},
    }  # fmt: skip
    nothing = generation.batch_from_proto(inference_service_pb2.CreateBatchGenerationRequest(), found)
    assert (nothing.version, nothing.history, nothing.parameters) == (None, HistoryPolicy.REFUSE, GenerationParameters())


def test_everything_that_may_be_said_of_a_training_is_read() -> None:
    found = Violations()
    said = {
        "packing": False,
        "early_stopping": {"patience": 2, "min_delta": 0.5},
        "loss_on": "LOSS_ON_ALL",
        "overlong_policy": "OVERLONG_POLICY_SPLIT",
        "objective": "OBJECTIVE_ORPO",
        "preference_strength": 0.2,
        "micro_batch_tokens": 512,
        "gradient_checkpointing": True,
        "retry_out_of_memory": False,
        "checkpointing": {"keep_best": False},
        "evaluation": {"sample_prompts": ["Hi"], "sample_tokens": 8},
    }
    asked = fine_tuning.parameters_from_proto(json_format.ParseDict(said, fine_tuning_pb2.TrainingParameters()), found)
    assert named(found) == []
    assert asked == ParametersRequest(
        packing=False, early_stopping=EarlyStopping(2, 0.5), loss_on=LossOn.ALL, overlong_policy=OverlongPolicy.SPLIT,
        objective=Objective.ORPO, preference_strength=0.2, micro_batch_tokens=512, gradient_checkpointing=True, retry_out_of_memory=False,
        keep_best=False, sample_prompts=("Hi",), sample_tokens=8,
    )  # fmt: skip


def test_reranking_is_read_written_whole_and_turned_off_by_an_empty_model() -> None:
    found = Violations()
    asked = retrieval_pb2.RetrievalConfig.Rerank(model="m", candidates=9, timeout_seconds=0.5)
    assert retrieval.overrides_from_proto(retrieval_pb2.RetrievalConfig(rerank=asked), found).rerank == Rerank("m", 9, 0.5)
    bare = retrieval.overrides_from_proto(retrieval_pb2.RetrievalConfig(rerank=retrieval_pb2.RetrievalConfig.Rerank(model="m")), found)
    settings = merge_retrieval(RetrievalSettings(top_k=7), bare)
    written = retrieval.settings_to_proto(settings).rerank
    assert (written.model, written.candidates, written.timeout_seconds) == ("m", 28, 2.0)
    off = retrieval.overrides_from_proto(retrieval_pb2.RetrievalConfig(rerank=retrieval_pb2.RetrievalConfig.Rerank()), found)
    assert merge_retrieval(settings, off).rerank is None
    assert merge_retrieval(settings, RetrievalOverrides()).rerank == Rerank("m")
    assert not retrieval.settings_to_proto(merge_retrieval(settings, off)).HasField("rerank")
    assert named(found) == []
    none = retrieval_pb2.RetrievalConfig.Rerank(model="m", candidates=0)
    retrieval.overrides_from_proto(retrieval_pb2.RetrievalConfig(rerank=none), found)
    assert named(found) == ["retrieval.rerank.candidates"]


def test_in_which_numbers_a_model_embeds_is_read_and_shown_everywhere() -> None:
    found = Violations()
    number, backend = embedding_model_pb2.EmbeddingModel.BACKEND_BFLOAT16, EmbeddingBackend.BFLOAT16
    create = model_service_pb2.CreateRagModelRequest(embedding_backend=number)
    assert models.create_rag_from_proto(create, found).embedding_backend is backend
    assert models.create_rag_from_proto(model_service_pb2.CreateRagModelRequest(), found).embedding_backend is None
    assert embedding.embed_from_proto(inference_service_pb2.EmbedRequest(backend=number), found).backend is backend
    assert RAG_MODEL.rag is not None
    assert models.rag_to_proto(replace(RAG_MODEL.rag, embedding_backend=backend), 0, 0).embedding_backend == number
    assert jobs.spec_to_proto(replace(INDEX, embedding_backend=backend)).rag_index.embedding_backend == number
    assert named(found) == []


def test_what_became_of_a_reranking_goes_with_every_answer() -> None:
    late = RerankOutcome(20, RerankFailure.TIMEOUT, "Too late.")
    said = {"reranked": False, "reason": "REASON_TIMEOUT", "message": "Too late.", "candidate_count": 20}
    sources = replace(RAG_ANSWER.sources, rerank=late)
    settings = RetrievalSettings(rerank=Rerank("m"))
    for message in (
        rag.rag_answer_to_proto(replace(RAG_ANSWER, sources=sources)),
        rag.sources_to_proto(sources),
        retrieval.retrieved_to_proto(Retrieved([], settings, RetrievalTimings(0.1, 0.2, 0.8, 0.5), "q", late)),
    ):
        written = json_format.MessageToDict(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
        assert written["rerank"] == said
    done = retrieval.retrieved_to_proto(Retrieved([], settings, RetrievalTimings(0.1, 0.2, 0.8, 0.5), "q", RerankOutcome(20)))
    assert (done.rerank.reranked, done.rerank.reason, done.timings.rerank_seconds) == (True, 0, 0.5)
    assert not rag.rag_answer_to_proto(RAG_ANSWER).HasField("rerank")


FILTER = (
    MetadataCondition("year", at_least=2020, at_most=2024.5),
    MetadataCondition("date", at_most="2026-01-01"),
    MetadataCondition("draft", equals=False),
    MetadataCondition("لغة", any_of=("ar", 1, True)),
    MetadataCondition("author", exists=False),
)


def test_search_settings_read_back_as_they_were_written() -> None:
    found = Violations()
    settings = RetrievalSettings(7, -0.5, SearchMode.HYBRID, 900, 0.0, 2.5, FILTER, None, 3, 0.25)
    read = retrieval.overrides_from_proto(retrieval.settings_to_proto(settings), found)
    assert read == RetrievalOverrides(7, -0.5, SearchMode.HYBRID, 900, 0.0, 2.5, FILTER, None, 3, 0.25)
    assert [type(value) for condition in read.filter or () for value in condition.any_of] == [str, int, bool]
    assert not found.found


@pytest.mark.parametrize(
    ("condition", "field"),
    [
        ({}, ""),
        ({"equals": None}, ".equals"),
        ({"equals": [1]}, ".equals"),
        ({"any_of": []}, ".any_of"),
        ({"any_of": ["a", {}]}, ".any_of[1]"),
        ({"range": {}}, ".range"),
        ({"range": {"at_least": True}}, ".range.at_least"),
        ({"range": {"at_least": 1, "at_most": "b"}}, ".range"),
    ],
)
def test_a_condition_that_tests_nothing_is_refused_by_its_place(condition: dict[str, object], field: str) -> None:
    found = Violations()
    message = json_format.ParseDict({"filter": {"conditions": [{"key": "year", **condition}]}}, retrieval_pb2.RetrievalConfig())
    retrieval.overrides_from_proto(message, found)
    assert named(found) == [f"retrieval.filter.conditions[0]{field}"]


def test_the_effective_configuration_reads_back_as_what_was_resolved() -> None:
    config = fine_tuning.fine_tune_to_proto(FINE_TUNE)
    assert techniques.lora_from_proto(config.lora, Violations(), "lora") == FINE_TUNE.technique
    asked = fine_tuning.parameters_from_proto(config.parameters, Violations())
    resolved = FINE_TUNE.parameters
    assert (asked.epochs, asked.batch_size, asked.learning_rate, asked.scheduler) == (
        resolved.epochs, resolved.batch_size, resolved.learning_rate, resolved.scheduler,
    )  # fmt: skip
    assert (asked.warmup_steps, asked.evaluate_every_steps, asked.checkpoint_every_steps, asked.seed) == (
        resolved.warmup_steps, resolved.evaluate_every_steps, resolved.checkpoint_every_steps, resolved.seed,
    )  # fmt: skip


def test_unknown_roles_are_named_and_do_not_hide_other_turns() -> None:
    found = Violations()
    said = [("boss", "a"), ("Assistant", "b"), ("user", "c")]
    messages = [message_pb2.Message(role=role, content=content) for role, content in said]
    turns = generation.messages_from_proto(messages, found)
    assert named(found) == ["messages[0].role", "messages[1].role"]
    assert [turn.role for turn in turns] == [Role.USER, Role.ASSISTANT, Role.USER]


def test_inline_records_are_the_lines_of_a_dataset() -> None:
    turns = [message_pb2.Message(role="user", content="a"), message_pb2.Message(role="assistant", content="b")]
    records = [message_pb2.TrainingRecord(prompt="؟", completion="نعم"), message_pb2.TrainingRecord(messages=turns)]
    request = model_service_pb2.CreateFineTunedModelRequest(inline_records=records)
    lines = models.create_fine_tuned_from_proto(request, Violations()).inline_records
    assert [parse_record(line).is_plain for line in lines] == [True, False]
    assert json.loads(models.record_to_line(message_pb2.TrainingRecord(prompt=""))) == {"prompt": ""}
    others = [message_pb2.TrainingRecord(text="a b"), message_pb2.TrainingRecord(prompt="a", chosen="b", rejected="c")]
    assert [parse_record(models.record_to_line(record)).kind for record in others] == [RecordKind.TEXT, RecordKind.PREFERENCE]


def test_the_tools_of_an_inline_record_are_those_of_a_dataset() -> None:
    turns = [message_pb2.Message(role="user", content="a"), message_pb2.Message(role="assistant", content="b")]
    tools = ['{"type": "function", "function": {"name": "look_up"}}', '{"type": "function", "function": {"name": "count"}}']
    record = parse_record(models.record_to_line(message_pb2.TrainingRecord(messages=turns, tools=tools)))
    assert [json.loads(tool)["function"]["name"] for tool in record.tools] == ["look_up", "count"]
    with pytest.raises(RecordInvalid, match="tools"):
        parse_record(models.record_to_line(message_pb2.TrainingRecord(messages=turns, tools=["look_up"])))


def test_an_index_tells_its_space_and_how_similar_unrelated_texts_are_in_it() -> None:
    index = models.model_to_proto(RAG_MODEL).rag.index
    assert RAG_MODEL.rag is not None
    assert RAG_MODEL.rag.index is not None
    assert index.fingerprint == RAG_MODEL.rag.index.fingerprint
    assert {name: getattr(index.space, name) for name in index.space.DESCRIPTOR.fields_by_name} == asdict(RAG_MODEL.rag.index.space)  # type: ignore[arg-type]
    assert [(point.percent, point.similarity) for point in index.calibration.percentiles] == [(0.0, -0.1), (100.0, 0.7)]
    assert (index.calibration.pair_count, index.calibration.mean, index.calibration.deviation) == (552, 0.2, 0.1)


def test_a_percentile_rules_in_place_of_a_threshold() -> None:
    found = Violations()
    asked = retrieval.overrides_from_proto(retrieval_pb2.RetrievalConfig(similarity_percentile=95), found)
    assert (asked.similarity_percentile, asked.similarity_threshold) == (95, None)
    assert RAG_MODEL.rag is not None
    ruled = replace(RAG_MODEL, rag=replace(RAG_MODEL.rag, retrieval=RetrievalSettings(similarity_percentile=95)))
    stored = models.model_to_proto(ruled).rag.retrieval
    assert (stored.similarity_percentile, stored.HasField("similarity_threshold")) == (95, False)
    answered = retrieval.settings_to_proto(RetrievalSettings(similarity_threshold=0.4, similarity_percentile=95))
    assert (answered.similarity_percentile, answered.similarity_threshold) == (95, 0.4)


def test_an_index_to_be_is_asked_for_with_what_was_set() -> None:
    chunking = retrieval_pb2.ChunkingConfig(max_tokens=64)
    message = model_service_pb2.ReindexModelRequest(model_id="mdl_1", embedding_model="e", chunking=chunking, request_id="r")
    assert rag_indexes.reindex_from_proto(message) == ReindexModel("mdl_1", "e", 64, None, "r")
    answer = rag_indexes.reindexed_to_proto(Reindexed(JOB, [Finding(None, "EMBEDDING_MODEL_NOT_TUNED", "It was not.")]))
    assert (answer.training_job.job_id, answer.findings[0].code) == (JOB.job_id, "EMBEDDING_MODEL_NOT_TUNED")
    job = jobs.job_to_proto(replace(JOB, spec=IndexSpec("e", Chunking(64, 8), 2, is_reindex=True)))
    config = job.effective_config.rag_index
    assert (config.embedding_model, config.index_number, config.reindex) == ("e", 2, True)


def test_metadata_goes_out_and_comes_back() -> None:
    found = Violations()
    metadata: dict[str, MetadataValue] = {"language": "ar", "year": 2026, "score": 0.5, "public": True}
    back = documents.metadata_from_proto(documents.metadata_to_proto(metadata), found, "metadata")
    assert back == metadata
    assert isinstance(back["year"], int)
    struct = documents.metadata_to_proto({})
    struct.update({"list": [1], "object": {}, "null": None})
    documents.metadata_from_proto(struct, found, "metadata")
    assert sorted(named(found)) == ["metadata['list']", "metadata['null']", "metadata['object']"]


def test_a_job_is_written_whole() -> None:
    config = json_format.MessageToDict(fine_tuning.fine_tune_to_proto(FINE_TUNE), preserving_proto_field_name=True)
    assert json_format.MessageToDict(jobs.job_to_proto(JOB), preserving_proto_field_name=True) == {
        "job_id": "job_1", "kind": "KIND_FINE_TUNE", "model_id": "mdl_1", "state": "STATE_FAILED", "state_reason": "OUT_OF_MEMORY",
        "error": {"code": 9, "message": "No memory.", "details": [
            {"@type": "type.googleapis.com/google.rpc.ErrorInfo", "reason": "OUT_OF_MEMORY", "domain": "modeltraining",
             "metadata": {"suggestion": "smaller"}},
            {"@type": "type.googleapis.com/google.rpc.PreconditionFailure",
             "violations": [{"type": "OUT_OF_MEMORY", "subject": "smaller", "description": "No memory."}]},
        ]},
        "progress": {"step": 5, "total_steps": 10, "epoch": 0.5, "fraction": 0.5, "tokens": 5000.0, "tokens_per_second": 250.0,
                     "eta_seconds": 20.0, "loss": 1.5},
        "best": {"step": 4, "eval_loss": 1.25}, "attempt": 2, "last_sequence": 7,
        "effective_config": {"fine_tune": config},
        "usage": {"compute_seconds": 3.0, "peak_memory_bytes": 100.0, "tokens": 5000.0, "artifact_bytes": 10.0},
        "create_time": "2026-11-23T00:00:00Z", "start_time": "2026-11-23T00:00:00Z", "update_time": "2026-11-23T00:00:00Z",
    }  # fmt: skip
    assert jobs.spec_to_proto(INDEX).rag_index.embedding_model == INDEX.embedding_model


def test_models_and_documents_are_written_whole() -> None:
    tuned, answering = models.model_to_proto(MODEL), models.model_to_proto(RAG_MODEL)
    assert (tuned.technique, tuned.serving_version, dict(tuned.labels)) == (model_pb2.Model.TECHNIQUE_LORA, 1, {"team": "a"})
    assert not tuned.HasField("rag")
    assert (answering.rag.retrieval.top_k, answering.rag.document_count, answering.rag.chunk_count) == (5, 3, 12)
    assert answering.error.message == "It failed."
    assert not answering.HasField("serving_version")
    written = documents.document_to_proto(DOCUMENT)
    assert (written.state, written.error.message, written.metadata["year"]) == (document_pb2.Document.STATE_FAILED, "Empty.", 2026)


PAYLOADS: Sequence[tuple[LoggedPayload, str]] = [
    (StateChanged(JobState.FAILED, "x", ErrorData("INTERNAL", "X", "x"), JobState.RUNNING), "state_changed"),
    (Started(10, 2, 8, 2, 100, 1_000), "started"),
    (StepDone(1, 10, 0.1, 2.0, 1e-3, 0.5, 100, 50, 250.0, 9.0, 10**9), "step"),
    (Evaluated(5, 1.5, 100, 2, 0.1, best=True), "evaluation"),
    (CheckpointSaved(5, "default/jobs/secret/path", 10), "checkpoint"),
    (Preparing(5, 10, 700), "preparing"),
    (DataChecked(8, 2, 700, 300, 1, 2, (LengthBucket(64, 10),), (Finding(3, "DUPLICATE", "Again.", count=2),), 0.5, True), "data_checked"),
    (Sampled(5, "Who?", "Me."), "sample"),
    (Warned("RECORDS_DROPPED", "Two."), "warning"),
    (IndexProgress("doc_1", 1, 2, 3, "bad"), "document_indexed"),
    (IndexAdvanced(IndexCounters(2, 9, 5, 1)), "indexing"),
    (BatchAdvanced(BatchCounters(4, 1, 90, 40), 10, 5.0), "batch"),
]


def test_every_kind_of_event_has_a_case() -> None:
    assert {type(payload) for payload, _ in PAYLOADS} == set(get_args(LoggedPayload))


@pytest.mark.parametrize(("payload", "field"), PAYLOADS)
def test_an_event_is_written_with_its_number(payload: LoggedPayload, field: str) -> None:
    event = events.watch_item_to_proto("job_1", JobEvent(7, TIME, 2, payload))
    assert (event.WhichOneof("payload"), event.sequence, event.attempt, event.job_id) == (field, 7, 2, "job_1")
    assert event.time.ToDatetime(UTC) == TIME
    assert "secret" not in str(event)


def test_what_is_not_stored_has_no_number() -> None:
    items: list[WatchItem] = [Snapshot(JOB), Heartbeat("job_1", 7), Finished(JOB)]
    written = [events.watch_item_to_proto("job_1", item) for item in items]
    assert [(event.WhichOneof("payload"), event.sequence) for event in written] == [("snapshot", 0), ("heartbeat", 0), ("finished", 0)]


def test_a_coalesced_step_says_how_many_it_stands_for() -> None:
    step = StepDone(9, 10, 0.9, 1.0, 1e-3, 0.5, 90, 40, 250.0, 1.0, 10)
    event = events.watch_item_to_proto("job_1", CoalescedStep(JobEvent(12, TIME, 1, step), 4))
    assert (event.sequence, event.step.step, event.step.coalesced_steps) == (12, 9, 4)


def test_an_ungrounded_answer_names_no_generation() -> None:
    answer = rag.rag_answer_to_proto(RAG_ANSWER)
    assert answer.HasField("timings") is RAG_ANSWER.finished.grounded
    assert (answer.citations[0].quote, answer.chunks[0].scores.similarity) == ("quote", 0.5)
    assert not answer.chunks[0].scores.HasField("rerank")
    kinds = [rag.rag_event_to_proto(event).WhichOneof("event") for event in (RAG_ANSWER.sources, RAG_ANSWER.finished)]
    assert kinds == ["sources", "finished"]


def test_the_whole_catalogue_can_be_written() -> None:
    for base in BASE_MODELS:
        assert catalogue.base_model_to_proto(base, is_present=True).availability_reason == ""
        assert catalogue.base_model_to_proto(base, is_present=False).availability_reason
    for model in EMBEDDING_MODELS:
        written = catalogue.embedding_model_to_proto(model, is_present=False)
        assert (written.availability == catalogue.Availability.AVAILABILITY_UNAVAILABLE) is bool(model.refusal)


def test_an_upload_is_described_by_its_first_message() -> None:
    message = training_service_pb2.UploadDatasetRequest(display_name="d", format=dataset_pb2.Dataset.FORMAT_JSONL, validate_only=True)
    upload = datasets.upload_from_proto(message, Violations())
    assert (upload.display_name, upload.format, upload.validate_only) == ("d", DatasetFormat.JSONL, True)
