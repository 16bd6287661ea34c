"""Generation: what is asked of an engine and what it answers, token by token."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Literal

from server.domain.records import ToolCall


class Role(StrEnum):
    """Who speaks."""

    SYSTEM = "system"
    USER = "user"
    ASSISTANT = "assistant"
    TOOL = "tool"


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One turn of a conversation. The assistant may call tools; `name` and `call_id` say which tool answers to which call."""

    role: Role
    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    name: str = ""
    call_id: str = ""


@dataclass(frozen=True, slots=True)
class OutputConstraint:
    """A form that the text keeps; one of the two is set. `json_schema` is JSON text, `regex` matches the whole text."""

    json_schema: str = ""
    regex: str = ""


@dataclass(frozen=True, slots=True)
class GenerationParameters:
    """How to sample. temperature 0 is greedy; top_k 0 and top_p 1 are off; max_tokens None: up to 512 or the rest of the context.

    A `seed` of None draws one; the same seed gives the same text. `n` answers are `n` requests to an engine, which itself knows none.
    """

    max_tokens: int | None = None
    temperature: float = 0.7
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stop: tuple[str, ...] = ()
    seed: int | None = None
    logprobs: int | None = None
    n: int = 1
    stop_token_ids: tuple[int, ...] = ()
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    constraint: OutputConstraint | None = None


class HistoryPolicy(StrEnum):
    """What becomes of a conversation that leaves no room for an answer: refused, or its oldest turns are left out."""

    REFUSE = "REFUSE"
    DROP_OLDEST = "DROP_OLDEST"


class Priority(StrEnum):
    """Who comes first where requests wait for a place: a head start on those that arrived earlier, so that nobody waits for ever."""

    LOW = "LOW"
    NORMAL = "NORMAL"
    HIGH = "HIGH"


@dataclass(frozen=True, slots=True)
class ModelReference:
    """Which weights: a base model, and perhaps a version's adapter (path relative to MODEL_STORAGE_PATH, sealed by its manifest)."""

    model_id: str
    base_model: str
    version: int | None = None
    adapter_path: str | None = None
    manifest_sha256: str | None = None


@dataclass(frozen=True, slots=True)
class QuotedText:
    """A text in which nothing acts for a certain model, and its tokens by that model's tokenizer, without special ones."""

    text: str
    token_count: int


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One generation. Exactly one of `prompt` (continued as it is) and `messages` (through the chat template) is set.

    `tools` are JSON texts, as in records; with `echo_prompt` the end of the answer says what the model was given. Requests with the same
    `choice_of` are choices of one answer: they differ in their sampling only, and an engine may read their prompt once.
    """

    request_id: str
    model: ModelReference
    parameters: GenerationParameters
    prompt: str | None = None
    messages: Sequence[ChatMessage] = ()
    priority: Priority = Priority.NORMAL
    tools: tuple[str, ...] = ()
    history: HistoryPolicy = HistoryPolicy.REFUSE
    echo_prompt: bool = False
    choice_of: str = ""


@dataclass(frozen=True, slots=True)
class RenderedPrompt:
    """What a model would be given, and what it takes together with an answer; `dropped_messages` were left out, oldest first."""

    text: str
    token_ids: Sequence[int]
    context_tokens: int
    dropped_messages: int = 0
    kind: Literal["rendered"] = "rendered"


class FinishReason(StrEnum):
    """Why generation ended: the model's own end token, the token limit, a stop string, one of the caller's stop tokens."""

    STOP = "STOP"
    LENGTH = "LENGTH"
    STOP_STRING = "STOP_STRING"
    STOP_TOKEN = "STOP_TOKEN"  # noqa: S105  # no secret


@dataclass(frozen=True, slots=True)
class TokenUsage:
    """Exact token counts."""

    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class Timings:
    """Where the time went, in seconds: waiting for a place, for weights and for an adapter; to the first token and the end from arrival."""

    queue_seconds: float
    first_token_seconds: float
    total_seconds: float
    load_seconds: float = 0.0
    adapter_load_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token with its natural-log probability."""

    token: str
    logprob: float


@dataclass(frozen=True, slots=True)
class PositionLogprobs:
    """The chosen token of one position, and the most likely ones there."""

    chosen: TokenLogprob
    top: Sequence[TokenLogprob] = ()


@dataclass(frozen=True, slots=True)
class Delta:
    """A piece of text: whole characters only, never part of a stop string. May be empty where only logprobs came."""

    text: str
    logprobs: Sequence[PositionLogprobs] = ()
    kind: Literal["delta"] = "delta"


@dataclass(frozen=True, slots=True)
class GenerationFinished:
    """The end of a generation that went well. `max_tokens` and `seed` are those that counted, whether asked for or not."""

    finish_reason: FinishReason
    usage: TokenUsage
    timings: Timings
    max_tokens: int
    seed: int
    dropped_messages: int = 0
    rendered_prompt: str | None = None
    kind: Literal["finished"] = "finished"

    def fill_in(self, parameters: GenerationParameters) -> GenerationParameters:
        """Give the parameters that were asked for with what the engine decided."""
        return replace(parameters, max_tokens=self.max_tokens, seed=self.seed)


TokenEvent = Delta | GenerationFinished


class EmbedRole(StrEnum):
    """Queries and passages are prepared differently by some embedding models."""

    QUERY = "QUERY"
    PASSAGE = "PASSAGE"
