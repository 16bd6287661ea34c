"""Cross entropy at trained positions only, a few of them at a time: logits [T, V] never exist as a whole.

For SmolLM2 (V = 49,152) the logits of 1,024 tokens would take 200 MB in float32, and their gradient as much again.
"""

# ruff: noqa: N803, N806 -- shapes stand in names: N trained tokens, D hidden width, V vocabulary; H heads, K key heads, L tokens

from typing import Any

import torch
from torch import nn
from torch.autograd import Function

from server.training.autograd import apply_function

# Rows of logits at once: 128 rows of 49,152 float32 numbers are 25 MB, which still fits into a server's last cache.
CHUNK_ROWS = 128


class _ChunkedCrossEntropy(Function):
    """Sum of cross entropies; computes the gradient in the forward pass, while each chunk's logits are at hand."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: torch.Tensor, weight_VD: torch.Tensor, targets_N: torch.Tensor, rows: int) -> torch.Tensor:
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        loss = hidden_ND.new_zeros((), dtype=torch.float32)
        gradient_ND = torch.empty_like(hidden_ND) if wants_hidden else None
        gradient_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if wants_weight else None
        for start in range(0, len(targets_N), rows):
            hidden, targets = hidden_ND[start : start + rows], targets_N[start : start + rows, None]
            logits = (hidden @ weight_VD.t()).float()
            log_sum = logits.logsumexp(-1, keepdim=True)
            loss += (log_sum - logits.gather(1, targets)).sum()
            if gradient_ND is None and gradient_VD is None:
                continue
            # d loss / d logits = softmax - one-hot
            error = logits.sub_(log_sum).exp_()
            error.scatter_add_(1, targets, torch.full_like(targets, -1, dtype=error.dtype))
            error = error.to(weight_VD.dtype)
            if gradient_ND is not None:
                torch.mm(error, weight_VD, out=gradient_ND[start : start + rows])
            if gradient_VD is not None:
                gradient_VD += error.t() @ hidden
        ctx.gradient_ND, ctx.gradient_VD, ctx.weight_dtype = gradient_ND, gradient_VD, weight_VD.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        scale = upstream[0]
        hidden = None if ctx.gradient_ND is None else ctx.gradient_ND * scale.to(ctx.gradient_ND.dtype)
        weight = None if ctx.gradient_VD is None else (ctx.gradient_VD * scale).to(ctx.weight_dtype)
        return hidden, weight, None, None


def sum_cross_entropy(hidden_ND: torch.Tensor, head: nn.Linear, targets_N: torch.Tensor, rows: int = CHUNK_ROWS) -> torch.Tensor:
    """Give the summed cross entropy (nats, float32 scalar) of N hidden states through an output head without bias."""
    return apply_function(_ChunkedCrossEntropy, hidden_ND, head.weight, targets_N, rows)
