"""InferenceService: generation with base models and fine-tuned versions, whole or token by token; documents in `retrieval` and `rag`."""

from collections.abc import AsyncGenerator
from dataclasses import dataclass

from server.domain.generation import GenerationRequest, ModelReference, RenderedPrompt
from server.services.embedding import Embedding
from server.services.generating import AnswerEvent, Generation, collect, generate_choices, limit_time
from server.services.model_ports import Engine
from server.services.rag_answers import RagAnswers
from server.services.references import References
from server.services.requests import Generate
from server.services.retrieval import Retrieval
from server.services.retrieval_evaluation import RetrievalEvaluator
from server.services.validation import MAX_PROMPT_CHARACTERS, Violations, check_generation, check_messages, check_tools

MAX_TIMEOUT_SECONDS = 86_400


@dataclass(frozen=True, slots=True)
class GenerationStream:
    """A running answer: the weights that give it, and its events. Close `events` to stop it."""

    model: ModelReference
    events: AsyncGenerator[AnswerEvent, None]


@dataclass(frozen=True, slots=True)
class Rendering:
    """A rendered prompt, and the weights that would be given it."""

    model: ModelReference
    prompt: RenderedPrompt


class InferenceService:
    """Use cases of generation; searches are in `retrieval` and `evaluator`, vectors in `embedding`, answers from documents in `rag`."""

    def __init__(self, engine: Engine, references: References, retrieval: Retrieval, evaluator: RetrievalEvaluator) -> None:
        self._engine = engine
        self._references = references
        self.retrieval = retrieval
        self.evaluator = evaluator
        self.embedding = Embedding(engine)
        self.rag = RagAnswers(retrieval, engine, references)

    async def generate(self, organization: str, request: Generate, request_id: str) -> Generation:
        """Answer as a whole. Raises InvalidInput, NotFound, FailedPrecondition, ResourceExhausted, DeadlineExceeded, Unavailable."""
        stream = await self.stream_generate(organization, request, request_id)
        return await collect(stream.model, stream.events)

    async def render(self, organization: str, request: Generate, request_id: str) -> Rendering:
        """Give what the model would be given. Raises InvalidInput, NotFound, FailedPrecondition, ResourceExhausted, Unavailable."""
        _check(request, parameters_field="")
        model = await self._references.resolve(organization, request.model_id, request.version)
        return Rendering(model, await self._engine.render(_make_request(request_id, model, request)))

    async def stream_generate(self, organization: str, request: Generate, request_id: str) -> GenerationStream:
        """Begin an answer: everything about the request that can be wrong is found before the first token."""
        _check(request)
        model = await self._references.resolve(organization, request.model_id, request.version)
        asked = _make_request(request_id, model, request)
        events = generate_choices(self._engine, asked)
        return GenerationStream(model, events if request.timeout_seconds is None else limit_time(events, request.timeout_seconds))


def _make_request(request_id: str, model: ModelReference, request: Generate) -> GenerationRequest:
    return GenerationRequest(
        request_id=request_id,
        model=model,
        parameters=request.parameters,
        prompt=request.prompt,
        messages=tuple(request.messages),
        priority=request.priority,
        tools=tuple(request.tools),
        history=request.history,
        echo_prompt=request.echo_prompt,
    )


def _check(request: Generate, parameters_field: str = "parameters.") -> None:
    found = Violations()
    if not request.model_id:
        found.add("model_id", "is required")
    found.number("version", request.version, 1, 2**31 - 1)
    found.number("timeout_seconds", request.timeout_seconds, 0, MAX_TIMEOUT_SECONDS, above=True)
    if (request.prompt is None) == (not request.messages):
        found.add("messages", "give exactly one of prompt and messages, and not an empty one")
    if request.prompt is not None:
        found.text("prompt", request.prompt, MAX_PROMPT_CHARACTERS, least=1)
    check_messages(found, request.messages)
    check_tools(found, request.tools, has_messages=bool(request.messages))
    check_generation(found, request.parameters, parameters_field)
    found.raise_if_any()
