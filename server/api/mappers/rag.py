"""Answers from documents, whole and streamed."""

from modeltraining.v1 import inference_service_pb2

from server.api.mappers.generation import (
    FinishReason,
    delta_to_proto,
    messages_from_proto,
    parameters_from_proto,
    parameters_to_proto,
    usage_to_proto,
)
from server.api.mappers.generation import timings_to_proto as generation_timings_to_proto
from server.api.mappers.retrieval import (
    chunk_to_proto,
    citation_to_proto,
    overrides_from_proto,
    rerank_outcome_to_proto,
    timings_to_proto,
)
from server.api.mappers.values import enum_to_proto
from server.domain.generation import Delta
from server.services.rag_answers import RagAnswer, RagEvent, RagFinished, Sources
from server.services.requests import RagGenerate
from server.services.validation import Violations

RagMessage = inference_service_pb2.RagGenerateRequest | inference_service_pb2.StreamRagGenerateRequest
StreamResponse = inference_service_pb2.StreamRagGenerateResponse


def rag_generate_from_proto(message: RagMessage, found: Violations) -> RagGenerate:
    """Read a question."""
    return RagGenerate(
        model_id=message.model_id,
        query=message.query,
        retrieval=overrides_from_proto(message.retrieval, found),
        parameters=parameters_from_proto(message.parameters),
        messages=messages_from_proto(message.messages, found),
    )


def rag_answer_to_proto(answer: RagAnswer) -> inference_service_pb2.RagGenerateResponse:
    """Write a whole answer."""
    finished = answer.finished
    return inference_service_pb2.RagGenerateResponse(
        text=answer.text,
        finish_reason=enum_to_proto(FinishReason, "FINISH_REASON", finished.finish_reason),
        usage=usage_to_proto(finished.usage),
        model_id=finished.model_id,
        generator_model_id=finished.generator.model_id,
        generator_version=finished.generator.version,
        timings=generation_timings_to_proto(finished.timings) if finished.grounded else None,
        retrieval_timings=timings_to_proto(answer.sources.timings),
        chunks=[chunk_to_proto(chunk) for chunk in answer.sources.chunks],
        citations=[citation_to_proto(citation) for citation in finished.citations],
        grounded=finished.grounded,
        dropped_citation_count=finished.dropped_citation_count,
        rerank=rerank_outcome_to_proto(answer.sources.rerank),
        searched_query=answer.sources.searched_query,
        effective_parameters=None if finished.parameters is None else parameters_to_proto(finished.parameters),
    )


def rag_event_to_proto(event: RagEvent) -> StreamResponse:
    """Write one item of a streamed answer."""
    if isinstance(event, Sources):
        return StreamResponse(sources=sources_to_proto(event))
    if isinstance(event, Delta):
        return StreamResponse(delta=delta_to_proto(event))
    return StreamResponse(finished=rag_finished_to_proto(event))


def sources_to_proto(sources: Sources) -> StreamResponse.Sources:
    """Write what an answer will be made from."""
    return StreamResponse.Sources(
        chunks=[chunk_to_proto(chunk) for chunk in sources.chunks],
        grounded=sources.grounded,
        retrieval_timings=timings_to_proto(sources.timings),
        rerank=rerank_outcome_to_proto(sources.rerank),
        searched_query=sources.searched_query,
    )


def rag_finished_to_proto(finished: RagFinished) -> StreamResponse.Finished:
    """Write the end of an answer."""
    return StreamResponse.Finished(
        finish_reason=enum_to_proto(FinishReason, "FINISH_REASON", finished.finish_reason),
        usage=usage_to_proto(finished.usage),
        model_id=finished.model_id,
        generator_model_id=finished.generator.model_id,
        generator_version=finished.generator.version,
        timings=generation_timings_to_proto(finished.timings) if finished.grounded else None,
        citations=[citation_to_proto(citation) for citation in finished.citations],
        grounded=finished.grounded,
        dropped_citation_count=finished.dropped_citation_count,
        effective_parameters=None if finished.parameters is None else parameters_to_proto(finished.parameters),
    )
