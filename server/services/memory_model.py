"""How much memory and disk a fine-tuning needs: a sum of its parts, each from the model's shape. Pure arithmetic.

Constants were fitted to the peaks of whole jobs on SmolLM2; tests/training/test_estimates.py compares both sides.
"""

from dataclasses import dataclass

from server.domain.shapes import Linear, ModelShape
from server.domain.specs import TrainingParameters
from server.domain.techniques import (
    AdaLora,
    FullTechnique,
    Ia3,
    LayerNormTuning,
    LoraTechnique,
    Oft,
    PrefixTuning,
    PromptTuning,
    PTuning,
    QloraTechnique,
    Technique,
    Vera,
)

HALF_BYTES = 2  # a weight or activation in bf16
MASTER_BYTES = 4  # a trained parameter in float32, or its gradient
MOMENTS_BYTES = 8  # AdamW's two, in float32
# Of a weight in bf16 (training/optimiser.py): what makes a float32 master of it, and the moments, the first in bf16.
REST_BYTES = 2
HALF_MOMENTS_BYTES = 6
# NF4 and FP4: half a byte, and a float32 scale per 64 weights, itself quantised to 8 bits where doubly quantised.
FOUR_BIT_BYTES = {False: 0.5 + 4 / 64, True: 0.5 + 1 / 64 + 4 / (64 * 256)}
# Python, torch, transformers and peft, as resident memory of an idle child.
PROCESS_BYTES = 650 << 20
# Rows of logits that exist at once (training/loss.py), in float32, with their gradient and a temporary.
LOGIT_ROWS, LOGIT_COPIES = 128, 3
# Up to here attention keeps whole score matrices; longer records are computed block by block (training/attention.py).
EXPLICIT_ATTENTION_TOKENS = 512
KEPT_CHECKPOINTS = 3  # the latest two and the best
TOKEN_DISK_BYTES = 9  # id, flag and weight in the cache
# Tokens computed at once where the caller does not say (training/state.py).
DEFAULT_MICRO_BATCH_TOKENS = 512


@dataclass(frozen=True, slots=True)
class Memory:
    """Peak memory of a job in bytes, by what it is for."""

    process: float
    weights: float
    trained: float
    activations: float

    @property
    def total(self) -> float:
        """The sum: all of it exists at once in the backward pass."""
        return self.process + self.weights + self.trained + self.activations


def estimate_memory(shape: ModelShape, technique: Technique, parameters: TrainingParameters, longest_tokens: int) -> Memory:
    """Estimate the peak of a training whose longest record has so many tokens."""
    return Memory(
        process=PROCESS_BYTES,
        weights=_weight_bytes(shape, technique),
        trained=_trained_bytes(shape, technique),
        activations=_activation_bytes(shape, technique, parameters, longest_tokens),
    )


def count_trained(shape: ModelShape, technique: Technique) -> int:
    """Count the parameters that are trained."""
    match technique:
        case FullTechnique():
            return shape.parameter_count
        case LoraTechnique():
            return _count_lora(shape, shape.select(technique.target_modules), technique.rank, technique.dora)
        case QloraTechnique():
            return count_trained(shape, technique.lora)
        case AdaLora():
            return _count_lora(shape, shape.linears, technique.initial_rank, False)
        case PromptTuning():
            return technique.virtual_tokens * shape.hidden_size
        case PTuning():
            width = technique.encoder_hidden_size or shape.hidden_size
            return technique.virtual_tokens * shape.hidden_size + 2 * shape.hidden_size * width + width * width
        case PrefixTuning():
            return technique.virtual_tokens * 2 * shape.layer_count * shape.key_head_count * shape.head_size
        case Ia3():
            return shape.layer_count * sum(linear.outputs for linear in shape.linears)
        case Vera():
            return shape.layer_count * sum(technique.rank + linear.outputs for linear in shape.linears)
        case Oft():
            blocks = sum(linear.inputs for linear in shape.linears) // technique.block_size
            return shape.layer_count * blocks * technique.block_size * (technique.block_size - 1) // 2
        case LayerNormTuning():
            return (2 * shape.layer_count + 1) * shape.hidden_size


def _count_lora(shape: ModelShape, linears: tuple[Linear, ...], rank: int, dora: bool) -> int:
    per_layer = sum(rank * (linear.inputs + linear.outputs) + (linear.outputs if dora else 0) for linear in linears)
    return shape.layer_count * per_layer


def _weight_bytes(shape: ModelShape, technique: Technique) -> float:
    if isinstance(technique, QloraTechnique):
        rest = shape.parameter_count - shape.linear_weights
        widest = max((linear.weights for linear in shape.linears), default=0)
        # One layer at a time exists de-quantised.
        return shape.linear_weights * FOUR_BIT_BYTES[technique.double_quantization] + rest * HALF_BYTES + 2 * widest * HALF_BYTES
    return shape.parameter_count * HALF_BYTES


def _trained_bytes(shape: ModelShape, technique: Technique) -> float:
    trained = count_trained(shape, technique)
    shared = 0.0
    if isinstance(technique, Vera):  # the random projections of the widest layer, which all share
        widest = max(max(linear.inputs, linear.outputs) for linear in shape.linears)
        shared = 2.0 * technique.rank * widest * MASTER_BYTES
    optimiser = REST_BYTES + HALF_MOMENTS_BYTES if isinstance(technique, FullTechnique) else MASTER_BYTES + MOMENTS_BYTES
    return trained * (MASTER_BYTES + optimiser) + shared


def _activation_bytes(shape: ModelShape, technique: Technique, parameters: TrainingParameters, longest_tokens: int) -> float:
    """What the forward pass keeps for the backward pass, for one micro-batch."""
    at_once = max(parameters.micro_batch_tokens or DEFAULT_MICRO_BATCH_TOKENS, longest_tokens)
    at_once = min(at_once, parameters.batch_size * longest_tokens)
    per_layer = at_once * _token_bytes(shape, technique, longest_tokens)
    logits = LOGIT_ROWS * shape.vocabulary_size * 4 * LOGIT_COPIES
    if parameters.gradient_checkpointing:
        return shape.layer_count * at_once * shape.hidden_size * HALF_BYTES + per_layer + logits
    return shape.layer_count * per_layer + logits


def _token_bytes(shape: ModelShape, technique: Technique, longest_tokens: int) -> float:
    """What one layer keeps per token: inputs of products, what attention and the gate multiply, and the scores of one record, twice."""
    query, key = shape.head_count * shape.head_size, shape.key_head_count * shape.head_size
    products = 6 * shape.hidden_size + 4 * shape.intermediate_size + 3 * query + 4 * key
    scores = shape.head_count * min(longest_tokens, EXPLICIT_ATTENTION_TOKENS)
    return HALF_BYTES * (_kept_share(technique) * products + 2 * scores)


def _kept_share(technique: Technique) -> float:
    """How much of a layer's products is kept. Measured on SmolLM2 at 150, 470 and 1,770 tokens a record.

    Fused layers keep less, adapters that go through peft's own layers more, and frozen layers nothing for their weights' sake.
    """
    match technique:
        case PromptTuning() | PTuning() | PrefixTuning() | LayerNormTuning():
            return 0.43
        case QloraTechnique():
            return 1.3 * _kept_share(technique.lora)
        case LoraTechnique(dora=True):
            return 4.0
        case LoraTechnique(dropout=dropout) if dropout > 0:
            return 3.0
        case Vera():
            return 2.45
        case Oft():
            return 2.2
        case FullTechnique():
            return 1.15
        case AdaLora() | Ia3():
            return 0.85
        case _:
            return 0.7


def estimate_disk(shape: ModelShape, technique: Technique, tokens: float) -> float:
    """Estimate the disk that checkpoints, result and token cache take, in bytes."""
    trained = count_trained(shape, technique)
    is_full = isinstance(technique, FullTechnique)
    result = shape.parameter_count * HALF_BYTES if is_full else trained * MASTER_BYTES
    moments = HALF_MOMENTS_BYTES if is_full else MOMENTS_BYTES
    return KEPT_CHECKPOINTS * trained * (MASTER_BYTES + moments) + result + tokens * TOKEN_DISK_BYTES


def estimate_flops_per_token(shape: ModelShape, technique: Technique) -> float:
    """Count floating point operations of a training step per token.

    Two per weight and token forward, two back to the activations, and two more for the gradient of a weight that is trained.
    """
    return shape.matrix_weights * (6.0 if isinstance(technique, FullTechnique) else 4.0)
