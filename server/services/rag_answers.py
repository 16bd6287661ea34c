"""Answers from documents: search, fill the generator's context with whole chunks, generate, verify what is cited."""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from server.domain.generation import (
    Delta,
    FinishReason,
    GenerationFinished,
    GenerationParameters,
    GenerationRequest,
    ModelReference,
    Timings,
    TokenUsage,
)
from server.domain.retrieval import Citation, RerankOutcome, RetrievedChunk
from server.services.citations import cite_answer
from server.services.followups import make_self_standing
from server.services.languages import NOTHING_FOUND, detect_language
from server.services.model_ports import Engine
from server.services.prompt_writing import PromptWriter
from server.services.rag_models import merge_retrieval
from server.services.references import References
from server.services.requests import RagGenerate
from server.services.retrieval import Retrieval, RetrievalTimings, Retrieved, check_query
from server.services.validation import Violations, check_generation, check_retrieval


@dataclass(frozen=True, slots=True)
class Sources:
    """The first item of an answer's stream: what it is made from."""

    chunks: Sequence[RetrievedChunk]
    grounded: bool
    timings: RetrievalTimings
    searched_query: str
    rerank: RerankOutcome | None = None


@dataclass(frozen=True, slots=True)
class RagFinished:
    """The last item: how it ended, and what the text cites, verified against the documents. `parameters` None: no model was asked."""

    finish_reason: FinishReason
    usage: TokenUsage
    timings: Timings
    model_id: str
    generator: ModelReference
    citations: Sequence[Citation]
    dropped_citation_count: int
    grounded: bool
    parameters: GenerationParameters | None = None


RagEvent = Sources | Delta | RagFinished


@dataclass(frozen=True, slots=True)
class RagAnswer:
    """A whole answer."""

    text: str
    sources: Sources
    finished: RagFinished


class RagAnswers:
    """The use cases RagGenerate and StreamRagGenerate."""

    def __init__(self, retrieval: Retrieval, engine: Engine, references: References) -> None:
        self._retrieval = retrieval
        self._engine = engine
        self._references = references
        self._prompts = PromptWriter(engine)

    async def generate(self, organization: str, request: RagGenerate, request_id: str) -> RagAnswer:
        """Answer as a whole."""
        texts: list[str] = []
        sources: Sources | None = None
        async with aclosing(self.stream(organization, request, request_id)) as events:
            async for event in events:
                if isinstance(event, Sources):
                    sources = event
                elif isinstance(event, Delta):
                    texts.append(event.text)
                elif sources is not None:
                    return RagAnswer("".join(texts), sources, event)
        raise RuntimeError("the answer's stream ended without its last event")

    async def stream(self, organization: str, request: RagGenerate, request_id: str) -> AsyncGenerator[RagEvent, None]:
        """Stream the sources, the text, and the verified citations. Where nothing passes the threshold no model is asked."""
        _check(request)
        rag = await self._retrieval.read_configuration(organization, request.model_id)
        generator = await self._references.resolve(organization, rag.generator_model_id)
        settings = merge_retrieval(rag.retrieval, request.retrieval)
        query = make_self_standing(request.query, request.messages)
        retrieved = await self._retrieval.search(organization, request.model_id, query, rag, settings)
        if not retrieved.chunks:
            for piece in _say_not_found(request, generator, retrieved):
                yield piece
            return
        prompt = await self._prompts.write(generator, request, rag.prompt_template, retrieved.chunks, settings.max_context_tokens)
        yield Sources(prompt.chunks, True, retrieved.timings, retrieved.searched_query, retrieved.rerank)
        asked = GenerationRequest(request_id, generator, request.parameters, messages=prompt.messages)
        texts: list[str] = []
        async with aclosing(self._engine.generate(asked)) as events:
            async for event in events:
                if isinstance(event, GenerationFinished):
                    yield _finish(request, generator, event, "".join(texts), prompt.chunks)
                    return
                texts.append(event.text)
                yield event


def _finish(
    request: RagGenerate, generator: ModelReference, end: GenerationFinished, text: str, chunks: Sequence[RetrievedChunk]
) -> RagFinished:
    cited, parameters = cite_answer(text, chunks), end.fill_in(request.parameters)
    return RagFinished(
        end.finish_reason,
        end.usage,
        end.timings,
        request.model_id,
        generator,
        cited.citations,
        cited.dropped_count,
        grounded=True,
        parameters=parameters,
    )


def _say_not_found(request: RagGenerate, generator: ModelReference, retrieved: Retrieved) -> Sequence[RagEvent]:
    nothing = Timings(0.0, 0.0, 0.0)
    return [
        Sources((), False, retrieved.timings, retrieved.searched_query, retrieved.rerank),
        Delta(NOTHING_FOUND[detect_language(request.query)]),
        RagFinished(FinishReason.STOP, TokenUsage(0, 0), nothing, request.model_id, generator, (), 0, grounded=False),
    ]


def _check(request: RagGenerate) -> None:
    found = Violations()
    check_query(found, request.model_id, request.query, request.messages)
    check_retrieval(found, request.retrieval)
    check_generation(found, request.parameters)
    if request.parameters.n != 1:
        found.add("parameters.n", "must be 1: an answer from documents is one, with its citations")
    found.raise_if_any()
