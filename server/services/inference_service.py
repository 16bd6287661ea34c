"""InferenceService: generation with base models and fine-tuned versions, whole or token by token; RAG is in `rag`."""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from server.domain.generation import (
    FinishReason,
    GenerationFinished,
    GenerationRequest,
    ModelReference,
    PositionLogprobs,
    Timings,
    TokenEvent,
    TokenUsage,
)
from server.services.ports import Engine
from server.services.rag_answers import RagAnswers
from server.services.references import References
from server.services.requests import Generate
from server.services.retrieval import Retrieval
from server.services.retrieval_evaluation import RetrievalEvaluator
from server.services.validation import MAX_PROMPT_CHARACTERS, Violations, check_generation, check_messages


@dataclass(frozen=True, slots=True)
class Generation:
    """A whole answer, with the weights that gave it."""

    text: str
    finish_reason: FinishReason
    usage: TokenUsage
    timings: Timings
    model: ModelReference
    logprobs: Sequence[PositionLogprobs]
    seed: int


@dataclass(frozen=True, slots=True)
class GenerationStream:
    """A running answer: the weights that give it, and its events. Close `events` to stop it."""

    model: ModelReference
    events: AsyncGenerator[TokenEvent, None]


class InferenceService:
    """Use cases of generation; searches are in `retrieval` and `evaluator`, answers from documents in `rag`."""

    def __init__(self, engine: Engine, references: References, retrieval: Retrieval, evaluator: RetrievalEvaluator) -> None:
        self._engine = engine
        self._references = references
        self.retrieval = retrieval
        self.evaluator = evaluator
        self.rag = RagAnswers(retrieval, engine, references)

    async def generate(self, organization: str, request: Generate, request_id: str) -> Generation:
        """Answer as a whole. Raises InvalidInput, NotFound, FailedPrecondition, ResourceExhausted, Unavailable."""
        stream = await self.stream_generate(organization, request, request_id)
        return await collect(stream.model, stream.events)

    async def stream_generate(self, organization: str, request: Generate, request_id: str) -> GenerationStream:
        """Begin an answer: everything about the request that can be wrong is found before the first token."""
        _check(request)
        model = await self._references.resolve(organization, request.model_id, request.version)
        asked = GenerationRequest(request_id, model, request.parameters, request.prompt, tuple(request.messages))
        return GenerationStream(model, self._engine.generate(asked))


async def collect(model: ModelReference, events: AsyncGenerator[TokenEvent, None]) -> Generation:
    """Read a stream to its end."""
    texts: list[str] = []
    logprobs: list[PositionLogprobs] = []
    async with aclosing(events) as stream:
        async for event in stream:
            if isinstance(event, GenerationFinished):
                return Generation("".join(texts), event.finish_reason, event.usage, event.timings, model, logprobs, event.seed)
            texts.append(event.text)
            logprobs.extend(event.logprobs)
    raise RuntimeError("the engine's stream ended without its last event")


def _check(request: Generate) -> None:
    found = Violations()
    if not request.model_id:
        found.add("model_id", "is required")
    found.number("version", request.version, 1, 2**31 - 1)
    if (request.prompt is None) == (not request.messages):
        found.add("messages", "give exactly one of prompt and messages, and not an empty one")
    if request.prompt is not None:
        found.text("prompt", request.prompt, MAX_PROMPT_CHARACTERS, least=1)
    check_messages(found, request.messages)
    check_generation(found, request.parameters)
    found.raise_if_any()
