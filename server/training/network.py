"""The model as the loop sees it: a micro-batch in, losses out, by the fastest way that gives the model's own numbers."""

from typing import cast

import torch
from peft import PeftModel, PeftType
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from server.training.attention import PACKED_ATTENTION, UnsupportedAttention, register_packed_attention
from server.training.batches import MicroBatch
from server.training.fused import fuse
from server.training.loss import sum_cross_entropy, token_cross_entropies
from server.training.virtual_tokens import PackedInputs, find_virtual_tokens

# Lengths of the made-up records by which a model is tried: both ways must give the same logits.
PROBE_LENGTHS = (7, 12, 9)
# Of the norm of the difference to the norm of the logits. bfloat16 keeps 8 bits, and sums in another order differ in the last of
# them at each layer: about 0.01 on SmolLM2. Records that see each other differ by 0.2 and more.
PROBE_TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 2e-2}


class Network:
    """A causal language model, whole or with adapters. Records lie end to end where the architecture allows it, else each runs alone."""

    def __init__(self, model: PeftModel | PreTrainedModel, *, packing: bool = True) -> None:
        causal = model.get_base_model() if isinstance(model, PeftModel) else model
        assert isinstance(causal, PreTrainedModel)
        self.model = model
        self._causal = causal
        self._virtual = find_virtual_tokens(model)
        self.packed = False
        fuse(model)
        if packing:
            self._try_packing()

    @property
    def can_recompute(self) -> bool:
        """Whether activations can be computed again in the backward pass; a prefix, which lies in a cache, would be lost by it."""
        active = self.model.active_peft_config if isinstance(self.model, PeftModel) else None
        return self._causal.supports_gradient_checkpointing and (active is None or active.peft_type != PeftType.PREFIX_TUNING)

    def set_recomputing(self, on: bool) -> None:
        """Compute each layer's activations again in the backward pass instead of keeping them, or not (Chen et al. 2016)."""
        if on:
            self._causal.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[no-untyped-call]  # as below
        elif self._causal.is_activation_checkpointing:
            self._causal.gradient_checkpointing_disable()  # type: ignore[no-untyped-call]  # transformers leaves it untyped

    def sum_loss(self, batch: MicroBatch) -> torch.Tensor:
        """Give the cross entropy summed over the batch's trained tokens, each times its weight (nats, float32 scalar)."""
        if self.packed:
            return sum_cross_entropy(self._hide_packed(batch), self._head(), batch.targets, batch.weights)
        return (self.token_losses(batch) * batch.weights).sum()

    def token_losses(self, batch: MicroBatch) -> torch.Tensor:
        """Give the cross entropy of each trained token (nats, [N] float32), unweighted, to be differentiated in any way."""
        if self.packed:
            return token_cross_entropies(self._hide_packed(batch), self._head(), batch.targets)
        return cross_entropy(self._logits_one_by_one(batch).float(), batch.targets, reduction="none")

    def _head(self) -> nn.Linear:
        return cast(nn.Linear, self._causal.get_output_embeddings())  # type: ignore[no-untyped-call]  # transformers leaves it untyped

    def _hide_packed(self, batch: MicroBatch) -> torch.Tensor:
        """Give the last hidden states at the predictors, [N, D]. The lengths go through to the attention function."""
        if self._virtual is None:
            arguments = {"input_ids": batch.token_ids[None], "position_ids": batch.positions[None], "record_lengths": batch.lengths}
            inputs = PackedInputs(arguments, batch.predictors)
        else:
            inputs = self._virtual.pack(batch)
        hidden: torch.Tensor = self._causal.base_model(**inputs.arguments, use_cache=False).last_hidden_state[0, inputs.predictors]
        return hidden

    def _logits_one_by_one(self, batch: MicroBatch) -> torch.Tensor:
        """Give the logits at the predictors, [N, V], by the model's own forward pass over one record after the other."""
        parts, start = [], 0
        model, shift = (self._causal, 0) if self._virtual is None else (self.model, self._virtual.places)
        for length in batch.lengths:
            inside = batch.predictors[(batch.predictors >= start) & (batch.predictors < start + length)]
            if len(inside):
                ids = batch.token_ids[None, start : start + length]
                parts.append(model(input_ids=ids, use_cache=False, logits_to_keep=inside - start + shift).logits[0])
            start += length
        return torch.cat(parts)

    def _try_packing(self) -> None:
        """Turn packing on where it gives the model's own logits; a model that it does not fit keeps its own forward pass."""
        head = self._head()
        config = self._causal.config.get_text_config()
        drops = (getattr(config, "attention_dropout", None) or 0.0) > 0.0
        if not self._causal._supports_attention_backend or type(head) is not nn.Linear or drops or hasattr(config, "attention_chunk_size"):
            return
        own_attention = self._causal.config._attn_implementation
        was_training = self.model.training
        self.model.eval()
        with torch.no_grad():
            probe = _make_probe(config.vocab_size, self._causal.device)
            expected = self._logits_one_by_one(probe).float()
            register_packed_attention()
            self._causal.set_attn_implementation(PACKED_ATTENTION)
            try:
                difference = (head(self._hide_packed(probe)).float() - expected).norm() / expected.norm()
                self.packed = float(difference) <= PROBE_TOLERANCES.get(self._causal.dtype, 1e-3)
            except UnsupportedAttention:
                self.packed = False
        self.model.train(was_training)
        if not self.packed:
            self._causal.set_attn_implementation(own_attention)


def _make_probe(vocabulary: int, device: torch.device) -> MicroBatch:
    """Make a batch of fixed, scattered token ids, all but each record's first one trained."""
    total = sum(PROBE_LENGTHS)
    token_ids = (torch.arange(1, total + 1) * 7919) % vocabulary
    positions = torch.cat([torch.arange(length) for length in PROBE_LENGTHS])
    trained = torch.nonzero(positions)[:, 0]
    batch = MicroBatch(
        token_ids=token_ids,
        positions=positions,
        lengths=PROBE_LENGTHS,
        predictors=trained - 1,
        targets=token_ids[trained],
        weights=torch.ones(len(trained)),
        sequences=torch.repeat_interleave(torch.tensor(PROBE_LENGTHS))[trained],
    )
    return batch.to(device)
