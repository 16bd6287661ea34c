"""What crosses the border between api and engine: the methods' names and their messages, as dataclasses in JSON. Knows no torch."""

import base64
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Literal

from server.domain.embeddings import EmbeddingBackend, Embeddings
from server.domain.engines import EngineStatus
from server.domain.errors import ErrorData
from server.domain.generation import Delta, EmbedRole, GenerationFinished, GenerationRequest, ModelReference, QuotedText, RenderedPrompt
from server.domain.previews import MeasureOrder, Preview, PreviewOrder
from server.services.codec import Codec

SERVICE_NAME = "modeltraining.engine.Engine"
# Requests carry whole conversations and answers vectors; gRPC's own bound of 4 MB is too small for a batch of texts.
MAX_MESSAGE_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class CountTokens:
    """Asks for token counts."""

    model: ModelReference
    texts: Sequence[str]


@dataclass(frozen=True, slots=True)
class QuoteTexts:
    """Asks for texts in which nothing acts."""

    model: ModelReference
    texts: Sequence[str]


@dataclass(frozen=True, slots=True)
class ReadContextTokens:
    """Asks for a model's context length."""

    model: ModelReference


@dataclass(frozen=True, slots=True)
class Embed:
    """Asks for vectors."""

    embedding_model: str
    texts: Sequence[str]
    role: EmbedRole
    backend: EmbeddingBackend


@dataclass(frozen=True, slots=True)
class Rerank:
    """Asks for the scores of texts for a query."""

    model: str
    query: str
    texts: Sequence[str]
    timeout_seconds: float


@dataclass(frozen=True, slots=True)
class RerankScores:
    """One score per text; None: the time was not enough."""

    scores: Sequence[float] | None
    kind: Literal["scores"] = "scores"


@dataclass(frozen=True, slots=True)
class Previewed:
    """Records as a base model reads them."""

    preview: Preview
    kind: Literal["previewed"] = "previewed"


@dataclass(frozen=True, slots=True)
class Load:
    """Asks for a model or a version to be loaded, and kept where `pinned`."""

    model: ModelReference
    pinned: bool = False


@dataclass(frozen=True, slots=True)
class Unload:
    """Asks for a model or a version to be dropped."""

    model: ModelReference


@dataclass(frozen=True, slots=True)
class Measured:
    """Token counts of records, one list per record with a count per sequence."""

    counts: Sequence[Sequence[int]]
    kind: Literal["measured"] = "measured"


@dataclass(frozen=True, slots=True)
class Forget:
    """Says that a model was deleted."""

    model_id: str


@dataclass(frozen=True, slots=True)
class Describe:
    """Asks for the engine's status."""


@dataclass(frozen=True, slots=True)
class Failure:
    """A typed error, as data; the last message of its call."""

    error: ErrorData
    kind: Literal["failure"] = "failure"


@dataclass(frozen=True, slots=True)
class TokenCounts:
    """One count per text."""

    counts: Sequence[int]
    kind: Literal["counts"] = "counts"


@dataclass(frozen=True, slots=True)
class QuotedTexts:
    """One quoted text per text."""

    texts: Sequence[QuotedText]
    kind: Literal["quoted"] = "quoted"


@dataclass(frozen=True, slots=True)
class ContextTokens:
    """A context length."""

    tokens: int
    kind: Literal["context"] = "context"


@dataclass(frozen=True, slots=True)
class Vectors:
    """One vector per text, one after the other as float32 (base64): as JSON numbers they would take longer than the embedding."""

    packed: str
    dimension: int
    token_counts: Sequence[int]
    max_tokens: int
    fingerprint: str
    kind: Literal["vectors"] = "vectors"


def pack_embeddings(embeddings: Embeddings) -> Vectors:
    """Write embeddings as a message."""
    numbers = array("f", chain.from_iterable(embeddings.vectors))
    packed = base64.b64encode(numbers.tobytes()).decode("ascii")
    return Vectors(packed, embeddings.dimension, tuple(embeddings.token_counts), embeddings.max_tokens, embeddings.fingerprint)


def unpack_embeddings(message: Vectors) -> Embeddings:
    """Read what `pack_embeddings` wrote."""
    numbers, width = array("f", base64.b64decode(message.packed)), message.dimension
    rows = [numbers[first : first + width] for first in range(0, len(numbers), width)]
    return Embeddings(rows, width, message.token_counts, message.max_tokens, message.fingerprint)


@dataclass(frozen=True, slots=True)
class Done:
    """Nothing to tell but that it is done."""

    kind: Literal["done"] = "done"


GenerateReply = Delta | GenerationFinished | Failure
UnaryReply = (
    RenderedPrompt
    | Previewed
    | Measured
    | TokenCounts
    | QuotedTexts
    | ContextTokens
    | Vectors
    | RerankScores
    | Done
    | EngineStatus
    | Failure
)

GENERATE = Codec[GenerationRequest](GenerationRequest)
COUNT_TOKENS = Codec[CountTokens](CountTokens)
QUOTE_TEXTS = Codec[QuoteTexts](QuoteTexts)
READ_CONTEXT_TOKENS = Codec[ReadContextTokens](ReadContextTokens)
EMBED = Codec[Embed](Embed)
LOAD = Codec[Load](Load)
UNLOAD = Codec[Unload](Unload)
RERANK = Codec[Rerank](Rerank)
FORGET = Codec[Forget](Forget)
PREVIEW = Codec[PreviewOrder](PreviewOrder)
MEASURE = Codec[MeasureOrder](MeasureOrder)
DESCRIBE = Codec[Describe](Describe)
GENERATE_REPLY = Codec[GenerateReply](GenerateReply)
UNARY_REPLY = Codec[UnaryReply](UnaryReply)
