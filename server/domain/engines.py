"""What an engine tells of itself: which weights it holds, how busy they are, and what it refuses to serve for now."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class ModelStatus:
    """Weights in memory, their context, and how busy their batch is. `variant` is empty for a base model as it is."""

    base_model: str
    weight_bytes: int
    context_tokens: int
    adapters_loaded: int
    running_requests: int
    waiting_requests: int
    reserved_cache_tokens: int
    variant: str = ""
    is_pinned: bool = False


@dataclass(frozen=True, slots=True)
class EngineStatus:
    """What an engine holds now. `instance` differs after a restart; `quarantined` names the versions whose files failed lately."""

    instance: str
    models: Sequence[ModelStatus]
    quarantined: Sequence[str] = ()
    kind: Literal["status"] = "status"
