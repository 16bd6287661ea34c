"""What the use cases need of models, as Protocols: an engine that runs them, and what can be known without one."""

from collections.abc import AsyncGenerator, Sequence
from typing import Protocol

from server.domain.embeddings import EmbeddingBackend, Embeddings
from server.domain.engines import EngineStatus
from server.domain.generation import EmbedRole, GenerationRequest, ModelReference, QuotedText, RenderedPrompt, TokenEvent
from server.domain.previews import MeasureOrder, Preview, PreviewOrder
from server.domain.shapes import ModelShape


class Generator(Protocol):
    """Models that generate, wherever they are computed. Every call may raise Unavailable; a stream may do so midway.

    Each implementation passes the contract suite in tests/inference/contract.
    """

    def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenEvent, None]:
        """Stream deltas, then GenerationFinished. Closing cancels and frees the place. InvalidInput: the prompt is over the context."""

    async def count_tokens(self, model: ModelReference, texts: Sequence[str]) -> Sequence[int]:
        """Count tokens by the model's own tokenizer, without special tokens."""

    async def render(self, request: GenerationRequest) -> RenderedPrompt:
        """Give what the model would be given for a request; a prompt over the context is no error here."""

    async def quote_texts(self, model: ModelReference, texts: Sequence[str]) -> Sequence[QuotedText]:
        """Break what the model's tokenizer or chat template would take for more than text: control tokens, headers of turns."""

    async def read_context_tokens(self, model: ModelReference) -> int:
        """Give the model's context length in tokens."""

    async def load(self, model: ModelReference, *, pinned: bool = False) -> None:
        """Load a model or a version before its first request; pinned, it stays until `unload`, `forget` or a restart of the engine."""

    async def unload(self, model: ModelReference) -> None:
        """Drop a version's adapter, or weights that only it needs, and its pin. What runs ends undisturbed; the next use loads again."""

    async def forget(self, model_id: str) -> None:
        """Drop what is loaded for a deleted model."""

    async def describe(self) -> EngineStatus:
        """Tell what is loaded and how busy it is. Its answer is the engine's health: Unavailable while it is down."""


class Engine(Generator, Protocol):
    """Models that generate and embed, outside of this process. Only generation has several implementations."""

    async def embed(
        self, embedding_model: str, texts: Sequence[str], role: EmbedRole, backend: EmbeddingBackend = EmbeddingBackend.FLOAT32
    ) -> Embeddings:
        """Embed to unit vectors, one per text."""

    async def rerank(self, model: str, query: str, texts: Sequence[str], timeout_seconds: float) -> Sequence[float] | None:
        """Score texts for a query by a cross-encoder, higher is better; None where the time was not enough."""

    async def preview(self, order: PreviewOrder) -> Preview:
        """Show records as a base model reads them. Raises FailedPrecondition where its tokenizer or the file cannot be read."""


class RecordMeter(Protocol):
    """Counts tokens of records by a base model's own tokenizer (EngineClient)."""

    async def measure(self, order: MeasureOrder) -> Sequence[Sequence[int]]:
        """Give a list per record with a count per sequence; unusable records are left out. Raises ServiceError."""


class BaseModels(Protocol):
    """What can be known about base and embedding models without loading them. Blocking: call it in a thread."""

    def check(self, base_model: str) -> None:
        """Raise NotFound, BaseModelUnavailable or BaseModelRefused where the model could not be loaded; convert and download nothing."""

    def check_cross_encoder(self, model: str) -> None:
        """Raise as `check`, and BaseModelRefused for one whose files lie here and say that it gives no one score for a pair of texts."""

    def is_present(self, base_model: str) -> bool:
        """Tell whether it can be loaded here now, without the hub."""

    def read_shape(self, base_model: str) -> ModelShape | None:
        """Give the shape of a model of the catalogue, or of one whose files lie here; None where nothing is known of it yet."""

    def canonical_name(self, base_model: str) -> str:
        """Give the hub id or path that an alias stands for; anything else stays."""
