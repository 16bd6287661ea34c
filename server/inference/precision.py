"""Logits of the likeliest tokens in float32. In bfloat16 a logit near 25 is a multiple of 0.125: rounding would decide close calls.

Only the head's last product is repeated, for a few tokens: its cost does not show.
"""

import torch
from torch import nn
from transformers import PreTrainedModel

REFINED_TOKENS = 64
# A plain head's bf16 logits differ from the exact ones by their own rounding; a head that scales or caps differs by far more.
RELATIVE_TOLERANCE = 0.05


class LogitRefiner:
    """Repeats the head's product in float32 for the likeliest tokens. Watches the head's input; belongs to one model and one thread."""

    def __init__(self, head: nn.Module, weight: torch.Tensor) -> None:
        self._weight = weight
        self._hidden: torch.Tensor | None = None
        head.register_forward_pre_hook(self._remember)

    def _remember(self, _head: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        self._hidden = inputs[0][:, -1]

    def refine(self, logits: torch.Tensor) -> torch.Tensor:
        """Give float32 logits [rows, vocabulary] for the head's logits of its last input, exact for the likeliest tokens."""
        hidden, self._hidden = self._hidden, None
        if hidden is None:
            return logits.float()
        likeliest = logits.topk(min(REFINED_TOKENS, logits.shape[-1])).indices
        exact = torch.einsum("rth,rh->rt", self._weight[likeliest].float(), hidden.float())
        coarse = logits.float()
        is_plain = (exact - coarse.gather(1, likeliest)).abs() <= RELATIVE_TOLERANCE * exact.abs().clamp(min=1.0)
        # Anything else than a plain product (a cap, a scale, numbers that are not finite) keeps what the model said.
        return coarse.scatter(1, likeliest, exact) if bool(is_plain.all()) else coarse


def make_refiner(model: PreTrainedModel) -> LogitRefiner | None:
    """Make the refiner of a model whose head is its embedding (for another, the weight would be kept twice); None where it has no use."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()  # type: ignore[no-untyped-call]  # transformers
    weight = getattr(embedding, "weight", None)
    if not isinstance(weight, torch.Tensor) or weight.dtype == torch.float32 or not model.config.get_text_config().tie_word_embeddings:
        return None
    if not isinstance(head, nn.Module) or getattr(head, "bias", None) is not None:
        return None
    return LogitRefiner(head, weight.detach())
