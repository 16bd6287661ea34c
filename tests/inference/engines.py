"""Engines over tiny models in float32."""

from dataclasses import dataclass
from pathlib import Path

import torch

from server.domain.errors import NotFound
from server.inference.batching import BatchLimits
from server.inference.engine import EmbeddedEngine, Reranker
from server.inference.library import BaseModelResolver, LoadingOptions
from server.storage.artefacts import ArtefactStore

LIMITS = BatchLimits(max_rows=8, max_waiting=24, cache_tokens=4096)


@dataclass(frozen=True)
class Resolved:
    """What a resolver gives."""

    directory: Path
    revision: str


@dataclass(frozen=True)
class Directories:
    """Resolves base models by a table."""

    table: dict[str, Path]

    def resolve(self, base_model: str, revision: str | None = None) -> Resolved:
        """Look a name up; all are of one revision, which is as good as any."""
        if base_model not in self.table:
            raise NotFound.of("base model", base_model)
        return Resolved(self.table[base_model], revision or "first")


def make_engine(
    table: dict[str, Path],
    storage: Path,
    limits: BatchLimits | None = None,
    max_model_bytes: int = 1 << 30,
    max_adapter_ranks: int = 256,
    dtype: torch.dtype = torch.float32,
    idle_seconds: float | None = None,
    base_models: BaseModelResolver | None = None,
    reranker: Reranker | None = None,
) -> EmbeddedEngine:
    """Make an engine over tiny models, in float32 where nothing else is said."""
    return EmbeddedEngine(
        base_models=base_models or Directories(table),
        versions=ArtefactStore(storage),
        embedder=None,
        reranker=reranker,
        options=LoadingOptions(limits or LIMITS, max_adapter_ranks, dtype),
        max_model_bytes=max_model_bytes,
        idle_seconds=idle_seconds,
    )
