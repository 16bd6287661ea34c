"""What a job is told to do: fully resolved, so that it can be repeated from its row, and what a caller may leave out."""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal

from server.domain.retrieval import Chunking


class Scheduler(StrEnum):
    """How the learning rate goes on after the warm-up."""

    LINEAR = "LINEAR"
    COSINE = "COSINE"
    CONSTANT = "CONSTANT"


class OverlongPolicy(StrEnum):
    """What happens to a record with more tokens than max_sequence_tokens."""

    REJECT = "REJECT"
    DROP = "DROP"


class LossOn(StrEnum):
    """Which tokens are trained."""

    ASSISTANT = "ASSISTANT"


@dataclass(frozen=True, slots=True)
class LoraTechnique:
    """Low-rank adapters beside frozen weights (Hu et al. 2021). `target_modules` names linear layers, or the one word all-linear."""

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    target_modules: tuple[str, ...] = ("all-linear",)
    kind: Literal["lora"] = "lora"


# The other techniques of the contract join here, each with its `kind`.
Technique = LoraTechnique


@dataclass(frozen=True, slots=True)
class TrainingParameters:
    """Every number of a fine-tuning run, resolved. Exactly one of `epochs` and `max_steps` rules: max_steps where it is set."""

    epochs: float
    max_steps: int | None
    batch_size: int
    learning_rate: float
    scheduler: Scheduler
    warmup_steps: int
    weight_decay: float
    max_gradient_norm: float
    max_sequence_tokens: int
    overlong_policy: OverlongPolicy
    loss_on: LossOn
    seed: int
    evaluate_every_steps: int
    checkpoint_every_steps: int


@dataclass(frozen=True, slots=True)
class ParametersRequest:
    """The same as a caller gave it; None takes the default."""

    epochs: float | None = None
    max_steps: int | None = None
    batch_size: int | None = None
    learning_rate: float | None = None
    scheduler: Scheduler | None = None
    warmup_steps: int | None = None
    warmup_ratio: float | None = None
    weight_decay: float | None = None
    max_gradient_norm: float | None = None
    max_sequence_tokens: int | None = None
    overlong_policy: OverlongPolicy | None = None
    loss_on: LossOn | None = None
    seed: int | None = None
    evaluate_every_steps: int | None = None
    checkpoint_every_steps: int | None = None


@dataclass(frozen=True, slots=True)
class FineTuneSpec:
    """A fine-tuning job, whole. `dataset_sha256` ties it to the bytes that were trained on."""

    base_model: str
    dataset_id: str
    dataset_sha256: str
    technique: Technique
    parameters: TrainingParameters
    eval_dataset_id: str | None = None
    eval_fraction: float = 0.0
    kind: Literal["fine_tune"] = "fine_tune"


@dataclass(frozen=True, slots=True)
class IndexSpec:
    """A RAG_INDEX job, whole: embeds every PENDING document of the model."""

    embedding_model: str
    chunking: Chunking = field(default_factory=Chunking)
    kind: Literal["rag_index"] = "rag_index"
