"""The techniques of fine-tuning: what of a model is trained, and in which shape. One dataclass each, told apart by `kind`.

The numbers are the contract's defaults; `default_learning_rate` is for an AdamW of supervised records.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar, Literal

ALL_LINEAR = "all-linear"


class TechniqueFamily(StrEnum):
    """The technique as a model shows it."""

    FULL = "FULL"
    LORA = "LORA"
    QLORA = "QLORA"
    PEFT = "PEFT"


class LoraInitialization(StrEnum):
    """How an adapter's factors start."""

    STANDARD = "STANDARD"
    PISSA = "PISSA"  # Meng et al. 2024
    OLORA = "OLORA"  # Büyükakyüz 2024
    LOFTQ = "LOFTQ"  # Li et al. 2023
    EVA = "EVA"  # Paischer et al. 2024


class Quantization(StrEnum):
    """How frozen weights are held in 4 bits (Dettmers et al. 2023)."""

    NF4 = "NF4"
    FP4 = "FP4"


class ComputeType(StrEnum):
    """In which type products with quantised weights are computed."""

    BFLOAT16 = "BFLOAT16"
    FLOAT32 = "FLOAT32"


@dataclass(frozen=True, slots=True)
class FullTechnique:
    """Every weight."""

    kind: Literal["full"] = "full"
    family: ClassVar = TechniqueFamily.FULL
    default_learning_rate: ClassVar = 5e-5


@dataclass(frozen=True, slots=True)
class LoraTechnique:
    """Low-rank adapters beside frozen weights (Hu et al. 2021). `target_modules` names linear layers, or the one word all-linear."""

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    target_modules: tuple[str, ...] = (ALL_LINEAR,)
    rank_stabilized: bool = False  # alpha / sqrt(rank), Kalajdzievski 2023
    dora: bool = False  # Liu et al. 2024
    initialization: LoraInitialization = LoraInitialization.STANDARD
    kind: Literal["lora"] = "lora"
    family: ClassVar = TechniqueFamily.LORA
    default_learning_rate: ClassVar = 1e-3


@dataclass(frozen=True, slots=True)
class QloraTechnique:
    """LoRA on weights held in 4 bits. `compute_type` None: bfloat16 where the processor has it, else float32."""

    lora: LoraTechnique = LoraTechnique()
    quantization: Quantization = Quantization.NF4
    double_quantization: bool = True
    compute_type: ComputeType | None = None
    kind: Literal["qlora"] = "qlora"
    family: ClassVar = TechniqueFamily.QLORA
    default_learning_rate: ClassVar = 1e-3


@dataclass(frozen=True, slots=True)
class PromptTuning:
    """Learned embeddings before the prompt (Lester et al. 2021). An empty `initial_text` starts them at random."""

    virtual_tokens: int = 20
    initial_text: str = ""
    kind: Literal["prompt_tuning"] = "prompt_tuning"
    family: ClassVar = TechniqueFamily.PEFT
    default_learning_rate: ClassVar = 3e-2


@dataclass(frozen=True, slots=True)
class PTuning:
    """The same through a small encoder (Liu et al. 2021). `encoder_hidden_size` None: the base model's hidden size."""

    virtual_tokens: int = 20
    encoder_hidden_size: int | None = None
    kind: Literal["p_tuning"] = "p_tuning"
    family: ClassVar = TechniqueFamily.PEFT
    default_learning_rate: ClassVar = 1e-3


@dataclass(frozen=True, slots=True)
class PrefixTuning:
    """Learned keys and values before those of every layer (Li and Liang 2021)."""

    virtual_tokens: int = 20
    kind: Literal["prefix_tuning"] = "prefix_tuning"
    family: ClassVar = TechniqueFamily.PEFT
    default_learning_rate: ClassVar = 1e-2


@dataclass(frozen=True, slots=True)
class Ia3:
    """Learned factors on keys, values and feed-forward activations (Liu et al. 2022)."""

    kind: Literal["ia3"] = "ia3"
    family: ClassVar = TechniqueFamily.PEFT
    default_learning_rate: ClassVar = 8e-3


@dataclass(frozen=True, slots=True)
class AdaLora:
    """LoRA whose rank is spread over the layers by need (Zhang et al. 2023)."""

    initial_rank: int = 24
    target_rank: int = 16
    kind: Literal["adalora"] = "adalora"
    family: ClassVar = TechniqueFamily.PEFT
    default_learning_rate: ClassVar = 5e-3


@dataclass(frozen=True, slots=True)
class Vera:
    """Learned vectors around random projections that all layers share (Kopiczko et al. 2024)."""

    rank: int = 256
    kind: Literal["vera"] = "vera"
    family: ClassVar = TechniqueFamily.PEFT
    default_learning_rate: ClassVar = 3e-2


@dataclass(frozen=True, slots=True)
class Oft:
    """Learned orthogonal blocks that turn the weights (Qiu et al. 2023)."""

    block_size: int = 32
    kind: Literal["oft"] = "oft"
    family: ClassVar = TechniqueFamily.PEFT
    default_learning_rate: ClassVar = 1e-3


@dataclass(frozen=True, slots=True)
class LayerNormTuning:
    """The normalisation layers only (Zhao et al. 2024)."""

    kind: Literal["layer_norm_tuning"] = "layer_norm_tuning"
    family: ClassVar = TechniqueFamily.PEFT
    default_learning_rate: ClassVar = 1e-3


PeftMethod = PromptTuning | PTuning | PrefixTuning | Ia3 | AdaLora | Vera | Oft | LayerNormTuning
Technique = FullTechnique | LoraTechnique | QloraTechnique | PeftMethod
