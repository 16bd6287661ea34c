"""What a job is told to do: fully resolved, so that it can be repeated from its row, and what a caller may leave out."""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal

from server.domain.embeddings import EmbeddingBackend
from server.domain.generation import GenerationParameters, HistoryPolicy
from server.domain.retrieval import FIRST_INDEX, Chunking
from server.domain.techniques import Technique


class Scheduler(StrEnum):
    """How the learning rate goes on after the warm-up."""

    LINEAR = "LINEAR"
    COSINE = "COSINE"
    CONSTANT = "CONSTANT"


class OverlongPolicy(StrEnum):
    """What happens to a record with more tokens than max_sequence_tokens."""

    REJECT = "REJECT"
    DROP = "DROP"
    TRUNCATE_PROMPT_LEFT = "TRUNCATE_PROMPT_LEFT"
    SPLIT = "SPLIT"


class LossOn(StrEnum):
    """Which tokens are trained."""

    ASSISTANT = "ASSISTANT"
    COMPLETION = "COMPLETION"
    ALL = "ALL"


class Objective(StrEnum):
    """What training makes better."""

    SUPERVISED = "SUPERVISED"
    DPO = "DPO"  # Rafailov et al. 2023
    ORPO = "ORPO"  # Hong et al. 2024

    @property
    def needs_pairs(self) -> bool:
        """Whether it learns from pairs of a chosen and a rejected answer."""
        return self is not Objective.SUPERVISED


DEFAULT_PREFERENCE_STRENGTH = 0.1
DEFAULT_SAMPLE_TOKENS = 64
DEFAULT_PATIENCE = 3


@dataclass(frozen=True, slots=True)
class EarlyStopping:
    """Stop after `patience` evaluations none of which was better than the best by more than `min_delta` (nats)."""

    patience: int = DEFAULT_PATIENCE
    min_delta: float = 0.0


@dataclass(frozen=True, slots=True)
class TrainingParameters:
    """Every number of a fine-tuning run, resolved. Exactly one of `epochs` and `max_steps` rules: max_steps where it is set.

    `micro_batch_tokens` and `gradient_checkpointing` None: what suits the machine and the memory.
    """

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
    # What follows came with the second version of the contract: jobs stored before it have these values.
    packing: bool = True
    objective: Objective = Objective.SUPERVISED
    preference_strength: float = DEFAULT_PREFERENCE_STRENGTH
    micro_batch_tokens: int | None = None
    gradient_checkpointing: bool | None = None
    retry_out_of_memory: bool = True
    keep_best: bool = False
    early_stopping: EarlyStopping | None = None
    sample_prompts: tuple[str, ...] = ()
    sample_tokens: int = DEFAULT_SAMPLE_TOKENS


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
    packing: bool | None = None
    objective: Objective | None = None
    preference_strength: float | None = None
    micro_batch_tokens: int | None = None
    gradient_checkpointing: bool | None = None
    retry_out_of_memory: bool | None = None
    keep_best: bool | None = None
    early_stopping: EarlyStopping | None = None
    sample_prompts: tuple[str, ...] = ()
    sample_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class VersionReference:
    """A version of a model; None: the one that is served."""

    model_id: str
    version: int | None = None


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
    warm_start_from: VersionReference | None = None
    kind: Literal["fine_tune"] = "fine_tune"


@dataclass(frozen=True, slots=True)
class IndexSpec:
    """A RAG_INDEX job, whole: embeds what waits of the model's documents into its index of this number.

    `is_reindex`: it builds that index beside the one that answers, of all documents that are found there, and then lets it answer.
    """

    embedding_model: str
    chunking: Chunking = field(default_factory=Chunking)
    index_number: int = FIRST_INDEX
    embedding_backend: EmbeddingBackend = EmbeddingBackend.FLOAT32
    is_reindex: bool = False
    kind: Literal["rag_index"] = "rag_index"


class ExportFormat(StrEnum):
    """As what a version is exported."""

    ADAPTER = "ADAPTER"
    MERGED = "MERGED"


@dataclass(frozen=True, slots=True)
class ExportSpec:
    """An EXPORT job, whole: writes a version as files that plain transformers and peft load."""

    base_model: str
    version: int
    format: ExportFormat
    kind: Literal["export"] = "export"


@dataclass(frozen=True, slots=True)
class BatchSpec:
    """A BATCH_GENERATION job, whole: answers each record of a dataset by a base model, or by a version of the job's model.

    `parameters.seed` is set wherever it counts, so that the job can be repeated from its row.
    """

    base_model: str
    version: int | None
    dataset_id: str
    dataset_sha256: str
    parameters: GenerationParameters
    history: HistoryPolicy = HistoryPolicy.REFUSE
    kind: Literal["batch_generation"] = "batch_generation"


Spec = FineTuneSpec | IndexSpec | ExportSpec | BatchSpec
