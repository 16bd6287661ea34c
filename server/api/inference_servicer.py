"""InferenceService on the wire: decode, one call, encode."""
# ruff: noqa: N802  # methods are named as their RPCs are

from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial

from grpc import aio
from modeltraining.v1 import inference_service_pb2 as pb
from modeltraining.v1 import training_job_pb2
from modeltraining.v1.inference_service_pb2_grpc import InferenceServiceServicer

from server.api.calls import CURRENT_CALL
from server.api.decoding import create_or_refuse
from server.api.mappers.embedding import embed_from_proto, embedded_to_proto
from server.api.mappers.evaluation import evaluate_from_proto, evaluation_to_proto
from server.api.mappers.generation import (
    GenerateMessage,
    PromptMessage,
    batch_from_proto,
    count_to_proto,
    delta_to_proto,
    finished_to_proto,
    generate_from_proto,
    generation_to_proto,
    prompt_from_proto,
    rendering_to_proto,
)
from server.api.mappers.jobs import job_to_proto
from server.api.mappers.rag import RagMessage, rag_answer_to_proto, rag_event_to_proto, rag_generate_from_proto
from server.api.mappers.retrieval import retrieve_from_proto, retrieved_to_proto
from server.api.pacing import HEARTBEAT_SECONDS, beat_while_idle
from server.domain.generation import Delta
from server.services.batch_generation import BatchGeneration
from server.services.generating import AnswerFinished, ChoiceDelta
from server.services.inference_service import InferenceService
from server.services.rag_answers import RagFinished, Sources
from server.services.requests import Generate, RagGenerate, Retrieve
from server.services.retrieval_evaluation import check_candidates
from server.services.validation import Violations, check_generation, check_messages, check_retrieval

Context = aio.ServicerContext


class InferenceServicer(InferenceServiceServicer):
    """The use cases of generation and retrieval, for one organization."""

    def __init__(
        self, service: InferenceService, batches: BatchGeneration, organization: str, heartbeat_seconds: float = HEARTBEAT_SECONDS
    ) -> None:
        self._service = service
        self._batches = batches
        self._organization = organization
        self._heartbeat_seconds = heartbeat_seconds

    async def Generate(self, request: pb.GenerateRequest, context: Context[pb.GenerateRequest, pb.GenerateResponse]) -> pb.GenerateResponse:
        """Answer as a whole."""
        wanted = _decode_generate(request)
        return generation_to_proto(await self._service.generate(self._organization, wanted, CURRENT_CALL.get().call_id))

    async def StreamGenerate(
        self, request: pb.StreamGenerateRequest, context: Context[pb.StreamGenerateRequest, pb.StreamGenerateResponse]
    ) -> AsyncGenerator[pb.StreamGenerateResponse, None]:
        """Answer piece by piece."""
        wanted = _decode_generate(request)
        stream = await self._service.stream_generate(self._organization, wanted, CURRENT_CALL.get().call_id)
        async with aclosing(beat_while_idle(stream.events, self._heartbeat_seconds)) as events:
            async for event in events:
                match event:
                    case ChoiceDelta():
                        yield pb.StreamGenerateResponse(delta=delta_to_proto(event.delta, event.choice))
                    case AnswerFinished():
                        yield pb.StreamGenerateResponse(finished=finished_to_proto(event, stream.model))
                    case None:
                        yield pb.StreamGenerateResponse(heartbeat=pb.Heartbeat())

    async def CreateBatchGeneration(
        self, request: pb.CreateBatchGenerationRequest, context: Context[pb.CreateBatchGenerationRequest, training_job_pb2.TrainingJob]
    ) -> training_job_pb2.TrainingJob:
        """Start to answer a dataset's records."""
        found = Violations()
        wanted = batch_from_proto(request, found)
        return job_to_proto(await create_or_refuse(wanted, found, partial(self._batches.create, self._organization)))

    async def CountTokens(
        self, request: pb.CountTokensRequest, context: Context[pb.CountTokensRequest, pb.CountTokensResponse]
    ) -> pb.CountTokensResponse:
        """Count a prompt's tokens."""
        wanted = _decode_prompt(request)
        return count_to_proto(await self._service.render(self._organization, wanted, CURRENT_CALL.get().call_id))

    async def RenderPrompt(
        self, request: pb.RenderPromptRequest, context: Context[pb.RenderPromptRequest, pb.RenderPromptResponse]
    ) -> pb.RenderPromptResponse:
        """Render a prompt."""
        wanted = _decode_prompt(request)
        return rendering_to_proto(await self._service.render(self._organization, wanted, CURRENT_CALL.get().call_id))

    async def RagGenerate(
        self, request: pb.RagGenerateRequest, context: Context[pb.RagGenerateRequest, pb.RagGenerateResponse]
    ) -> pb.RagGenerateResponse:
        """Answer from documents as a whole."""
        wanted = _decode_rag_generate(request)
        return rag_answer_to_proto(await self._service.rag.generate(self._organization, wanted, CURRENT_CALL.get().call_id))

    async def StreamRagGenerate(
        self, request: pb.StreamRagGenerateRequest, context: Context[pb.StreamRagGenerateRequest, pb.StreamRagGenerateResponse]
    ) -> AsyncGenerator[pb.StreamRagGenerateResponse, None]:
        """Answer from documents piece by piece."""
        wanted = _decode_rag_generate(request)
        stream = self._service.rag.stream(self._organization, wanted, CURRENT_CALL.get().call_id)
        async with aclosing(beat_while_idle(stream, self._heartbeat_seconds)) as events:
            async for event in events:
                match event:
                    case Sources() | Delta() | RagFinished():
                        yield rag_event_to_proto(event)
                    case None:
                        yield pb.StreamRagGenerateResponse(heartbeat=pb.Heartbeat())

    async def Retrieve(self, request: pb.RetrieveRequest, context: Context[pb.RetrieveRequest, pb.RetrieveResponse]) -> pb.RetrieveResponse:
        """Search without generating."""
        wanted = _decode_retrieve(request)
        return retrieved_to_proto(await self._service.retrieval.retrieve(self._organization, wanted))

    async def EvaluateRetrieval(
        self, request: pb.EvaluateRetrievalRequest, context: Context[pb.EvaluateRetrievalRequest, pb.EvaluateRetrievalResponse]
    ) -> pb.EvaluateRetrievalResponse:
        """Measure how well a model finds what answers queries."""
        found = Violations()
        wanted = evaluate_from_proto(request, found)
        if found.found:
            check_candidates(found, wanted.candidates)
            found.raise_if_any()
        return evaluation_to_proto(await self._service.evaluator.evaluate(self._organization, wanted))

    async def Embed(self, request: pb.EmbedRequest, context: Context[pb.EmbedRequest, pb.EmbedResponse]) -> pb.EmbedResponse:
        """Turn texts into vectors."""
        found = Violations()
        wanted = embed_from_proto(request, found)
        found.raise_if_any()
        return embedded_to_proto(await self._service.embedding.embed(wanted))


# What decoding finds bad is told together with what the plain checks find: a generation has no trial run.


def _decode_generate(request: GenerateMessage) -> Generate:
    found = Violations()
    wanted = generate_from_proto(request, found)
    if found.found:
        check_messages(found, wanted.messages)
        check_generation(found, wanted.parameters)
        found.raise_if_any()
    return wanted


def _decode_prompt(request: PromptMessage) -> Generate:
    found = Violations()
    wanted = prompt_from_proto(request, found)
    if found.found:
        check_messages(found, wanted.messages)
        found.raise_if_any()
    return wanted


def _decode_rag_generate(request: RagMessage) -> RagGenerate:
    found = Violations()
    wanted = rag_generate_from_proto(request, found)
    if found.found:
        check_retrieval(found, wanted.retrieval)
        check_generation(found, wanted.parameters)
        found.raise_if_any()
    return wanted


def _decode_retrieve(request: pb.RetrieveRequest) -> Retrieve:
    found = Violations()
    wanted = retrieve_from_proto(request, found)
    if found.found:
        check_retrieval(found, wanted.retrieval)
        found.raise_if_any()
    return wanted
