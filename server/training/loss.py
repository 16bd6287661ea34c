"""Cross entropy at trained positions only, a few of them at a time: logits [N, V] never exist as a whole.

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
# Rows of the head's gradient [V, D] that are added to at once: a product of the whole and its float32 copy would take 170 MB.
BLOCK_ROWS = 4096


class _SummedCrossEntropy(Function):
    """Weighted sum of cross entropies; computes the gradient in the forward pass, while each chunk's logits are at hand."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: torch.Tensor,
        weight_VD: torch.Tensor,
        bias_V: torch.Tensor | None,
        targets_N: torch.Tensor,
        weights_N: torch.Tensor,
        rows: int,
    ) -> torch.Tensor:
        gradients = _Gradients(hidden_ND, weight_VD, bias_V, ctx.needs_input_grad)
        loss = hidden_ND.new_zeros((), dtype=torch.float32)
        for start in range(0, len(targets_N), rows):
            part = slice(start, start + rows)
            logits, losses, log_sum = _losses(hidden_ND[part], weight_VD, bias_V, targets_N[part])
            loss += (losses * weights_N[part]).sum()
            gradients.add(part, logits, log_sum, targets_N[part], weights_N[part])
        ctx.gradients = gradients
        return loss

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        found = ctx.gradients.give(upstream[0])
        del ctx.gradients  # used up, and of the head's size
        return *found, None, None, None


class _TokenCrossEntropies(Function):
    """Cross entropy of each token; computes the logits again for the gradient, which needs the upstream one of each token."""

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: torch.Tensor, weight_VD: torch.Tensor, bias_V: torch.Tensor | None, targets_N: torch.Tensor, rows: int
    ) -> torch.Tensor:
        ctx.save_for_backward(hidden_ND, weight_VD, bias_V, targets_N)
        ctx.rows = rows
        parts = [slice(start, start + rows) for start in range(0, len(targets_N), rows)]
        empty = hidden_ND.new_zeros(0, dtype=torch.float32)
        return torch.cat([empty, *(_losses(hidden_ND[part], weight_VD, bias_V, targets_N[part])[1] for part in parts)])

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden_ND, weight_VD, bias_V, targets_N = ctx.saved_tensors
        gradients = _Gradients(hidden_ND, weight_VD, bias_V, ctx.needs_input_grad)
        for start in range(0, len(targets_N), ctx.rows):
            part = slice(start, start + ctx.rows)
            logits, _, log_sum = _losses(hidden_ND[part], weight_VD, bias_V, targets_N[part])
            gradients.add(part, logits, log_sum, targets_N[part], upstream[0][part])
        return *gradients.give(None), None, None


def _losses(
    hidden_ND: torch.Tensor, weight_VD: torch.Tensor, bias_V: torch.Tensor | None, targets_N: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Give logits [N, V], losses [N] and the logarithms of the sums [N, 1], all float32."""
    logits = nn.functional.linear(hidden_ND, weight_VD, bias_V).float()
    log_sum = logits.logsumexp(-1, keepdim=True)
    return logits, (log_sum - logits.gather(1, targets_N[:, None]))[:, 0], log_sum


class _Gradients:
    """The gradients by hidden states and by the head's weight and bias, added up chunk by chunk; only those that are wanted."""

    def __init__(self, hidden_ND: torch.Tensor, weight_VD: torch.Tensor, bias_V: torch.Tensor | None, wanted: tuple[bool, ...]) -> None:
        self._hidden_ND, self._weight_VD = hidden_ND.detach(), weight_VD.detach()
        self._by_hidden = torch.empty_like(hidden_ND) if wanted[0] else None
        self._by_weight = torch.zeros_like(weight_VD, dtype=torch.float32) if wanted[1] else None
        self._by_bias = torch.zeros_like(bias_V, dtype=torch.float32) if bias_V is not None and wanted[2] else None

    def add(self, part: slice, logits: torch.Tensor, log_sum: torch.Tensor, targets_N: torch.Tensor, weights_N: torch.Tensor) -> None:
        """Add a chunk, each of whose losses counts `weights_N` times. Uses up the logits."""
        if self._by_hidden is None and self._by_weight is None:
            return
        # d loss / d logits = softmax - one-hot
        error = logits.sub_(log_sum).exp_()
        error.scatter_add_(1, targets_N[:, None], torch.full_like(targets_N[:, None], -1, dtype=error.dtype))
        error.mul_(weights_N[:, None])
        if self._by_bias is not None:
            self._by_bias += error.sum(0)
        error = error.to(self._weight_VD.dtype)
        if self._by_hidden is not None:
            torch.mm(error, self._weight_VD, out=self._by_hidden[part])
        if self._by_weight is not None:
            for some in range(0, len(self._by_weight), BLOCK_ROWS):
                block = slice(some, some + BLOCK_ROWS)
                self._by_weight[block] += error[:, block].t() @ self._hidden_ND[part]

    def give(self, scale: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        """Give all times `scale`, the head's in float32. Uses them up: a head's is the largest tensor there is."""
        found = (self._by_hidden, self._by_weight, self._by_bias)
        return tuple(gradient if gradient is None or scale is None else gradient.mul_(scale.to(gradient.dtype)) for gradient in found)


def sum_cross_entropy(
    hidden_ND: torch.Tensor, head: nn.Linear, targets_N: torch.Tensor, weights_N: torch.Tensor, rows: int | None = None
) -> torch.Tensor:
    """Give the weighted sum of cross entropies (nats, float32 scalar) of N hidden states through an output head."""
    return apply_function(_SummedCrossEntropy, hidden_ND, head.weight, head.bias, targets_N, weights_N, rows or CHUNK_ROWS)


def token_cross_entropies(hidden_ND: torch.Tensor, head: nn.Linear, targets_N: torch.Tensor, rows: int | None = None) -> torch.Tensor:
    """Give the cross entropies [N] (nats, float32) of N hidden states through an output head."""
    return apply_function(_TokenCrossEntropies, hidden_ND, head.weight, head.bias, targets_N, rows or CHUNK_ROWS)
