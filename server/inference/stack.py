"""A whole model of fused layers run without transformers' own forward, whose wrappers take 4 % of a step of a small model."""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from server.inference.cache import CacheShape, RowCache, Step
from server.inference.layers import TOLERANCES, FusedLayer

TRIAL_TOKENS = 5


class Stack:
    """Embedding, layers, norm and head of a model, in this order and with nothing between them."""

    def __init__(self, base: Any, head: nn.Module) -> None:  # transformers' models share names, not a class
        self._embed, self._rotary, self._norm, self._head = base.embed_tokens, base.rotary_emb, base.norm, head
        self._layers = list(base.layers)

    def run(self, token_ids: torch.Tensor, step: Step, cache: RowCache, *, wants_logits: bool) -> torch.Tensor | None:
        """Run new tokens [rows, new tokens]; give the logits [rows, vocabulary] after each row's last one, if wanted."""
        hidden = self._embed(token_ids)
        rotary = self._rotary(hidden, position_ids=step.positions)
        for layer in self._layers:
            hidden = layer.forward(hidden, rotary, cache, step)
        if not wants_logits:
            return None
        logits: torch.Tensor = self._head(self._norm(hidden[:, -1:]))[:, -1]
        return logits


def make_stack(model: PreTrainedModel, shape: CacheShape) -> Stack | None:
    """Make the stack of a model whose layers are all fused; None where it has others, or does more than a stack and answers otherwise."""
    base, head = model.base_model, model.get_output_embeddings()  # type: ignore[no-untyped-call]  # transformers
    layers = getattr(base, "layers", None)
    if not isinstance(layers, nn.ModuleList) or not isinstance(head, nn.Module) or not all(isinstance(each, FusedLayer) for each in layers):
        return None
    if not all(hasattr(base, name) for name in ("embed_tokens", "rotary_emb", "norm")):
        return None
    stack = Stack(base, head)
    token_ids = torch.arange(2 * TRIAL_TOKENS, device=shape.device).view(2, TRIAL_TOKENS) % int(model.config.get_text_config().vocab_size)
    positions = torch.arange(TRIAL_TOKENS, device=shape.device).expand(2, -1)
    outputs = []
    for is_own in (True, False):
        cache, step = RowCache(shape, rows=2), Step(0, positions, TRIAL_TOKENS, shape.dtype)
        cache.begin(step)
        if is_own:
            arguments: dict[str, Any] = {"position_ids": positions, "past_key_values": cache, "use_cache": True, "step": step}
            outputs.append(model(input_ids=token_ids, **arguments, logits_to_keep=1).logits[:, -1])
        else:
            outputs.append(stack.run(token_ids, step, cache, wants_logits=True))
        cache.clear_all()
    theirs, ours = (output.float() for output in outputs)
    return stack if (theirs - ours).abs().max() <= TOLERANCES.get(shape.dtype, 0.0) * theirs.abs().max() else None
