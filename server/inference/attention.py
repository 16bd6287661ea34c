"""Attention over rows of different lengths, as a transformers attention function: modeling code calls it for every layer.

It replaces transformers' own mask making: the Step knows the positions, the layer its window.
"""

import torch
from torch.nn import functional
from transformers import AttentionInterface, PreTrainedModel

from server.inference.cache import Step

ATTENTION_NAME = "model_training_rows"
# Bounds of `_pays_to_multiply`: queries over all rows and groups, and scores over all heads.
MULTIPLIED_QUERIES, MULTIPLIED_SCORES = 12, 2_000_000


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, step: Step, scaling: float | None, window_tokens: int | None
) -> torch.Tensor:
    """Attend with queries [rows, heads, new, size] over keys and values [rows, kv heads, seen, size]; gives [rows, new, heads, size].

    Query heads of one key head are handled as further tokens of it: keys and values are read once and never repeated.
    """
    rows, heads, new_tokens, size = query.shape
    groups = heads // key.shape[1]
    grouped = query.reshape(rows, key.shape[1], groups * new_tokens, size)
    mask = step.mask(window_tokens, groups)
    if new_tokens == 1 and _pays_to_multiply(grouped, key):
        scores = torch.matmul(grouped, key.contiguous().transpose(2, 3)).mul_(scaling or size**-0.5).add_(mask)
        output = torch.matmul(torch.softmax(scores, dim=-1), value.contiguous())
    else:
        output = functional.scaled_dot_product_attention(grouped, key, value, attn_mask=mask, scale=scaling)
    return output.view(rows, heads, new_tokens, -1).transpose(1, 2)


def _pays_to_multiply(grouped: torch.Tensor, key: torch.Tensor) -> bool:
    """Tell where two plain products beat torch's CPU kernel: in bf16, for several rows whose scores stay in the processor's cache.

    Measured on AVX-512 BF16, 9 heads of 64: 16 rows of 136 keys 162 us against 258, of 1,024 keys 1.1 ms against 2.5; one row 41, 19.
    Reading prompts would gain too, but scores rounded to bf16 there change the first word of close calls: a request alone never comes here.
    """
    if grouped.device.type != "cpu" or grouped.dtype != torch.bfloat16 or grouped.shape[0] * grouped.shape[2] < MULTIPLIED_QUERIES:
        return False
    return grouped.shape[0] * grouped.shape[1] * grouped.shape[2] * key.shape[2] <= MULTIPLIED_SCORES


def attend_softcapped(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, step: Step, scaling: float, window_tokens: int | None, softcap: float
) -> torch.Tensor:
    """Attend with scores squeezed into +-softcap by tanh (Gemma 2); shapes as in `attend`."""
    rows, heads, new_tokens, size = query.shape
    groups = heads // key.shape[1]
    scores = query.reshape(rows, key.shape[1], groups * new_tokens, size) @ key.transpose(2, 3) * scaling
    scores = torch.tanh(scores / softcap) * softcap + step.mask(window_tokens, groups)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(value.dtype)
    return (weights @ value).view(rows, heads, new_tokens, -1).transpose(1, 2)


def row_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    step: Step,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """Serve transformers' attention interface. Raises ValueError for extras that are not computed here (sinks, position bias)."""
    if _.get("s_aux") is not None or _.get("position_bias") is not None:
        raise ValueError("attention sinks and position biases are not computed by this engine")
    if softcap is not None:
        return attend_softcapped(query, key, value, step, scaling or query.shape[-1] ** -0.5, sliding_window, softcap), None
    return attend(query, key, value, step, scaling, sliding_window), None


def use_row_attention(model: PreTrainedModel) -> bool:
    """Switch a model to row attention; False where its code has attention of its own (Falcon) and wants ready-made masks."""
    if not model._supports_attention_backend:
        model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")
        return False
    AttentionInterface.register(ATTENTION_NAME, row_attention)
    model.set_attn_implementation(ATTENTION_NAME)
    return True
