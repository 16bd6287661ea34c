"""The model as the loop sees it: a micro-batch in, a summed loss out, by the fastest way that gives the model's own numbers."""

import torch
from peft import PeftModel
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from server.training.attention import PACKED_ATTENTION, register_packed_attention
from server.training.batches import MicroBatch
from server.training.fused import fuse
from server.training.loss import sum_cross_entropy

# Lengths of the two made-up records by which a model is tried: both ways must give the same loss.
PROBE_LENGTHS = (7, 12)
# Relative. bfloat16 keeps 8 bits: sums in another order differ in the third digit; a wrong mask or head differs in the first.
PROBE_TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}


class Network:
    """A causal language model with adapters. Records lie end to end where the architecture allows it, else each runs alone."""

    def __init__(self, model: PeftModel) -> None:
        causal = model.get_base_model()
        assert isinstance(causal, PreTrainedModel)
        self.model = model
        self._causal = causal
        self.packed = False
        fuse(model)
        self._try_packing()

    def sum_loss(self, batch: MicroBatch) -> torch.Tensor:
        """Give the cross entropy summed over the batch's trained tokens (nats, float32 scalar)."""
        return self._sum_packed(batch) if self.packed else self._sum_one_by_one(batch)

    def _head(self) -> nn.Module | None:
        head: nn.Module | None = self._causal.get_output_embeddings()  # type: ignore[no-untyped-call]  # transformers leaves it untyped
        return head

    def _sum_packed(self, batch: MicroBatch) -> torch.Tensor:
        decoder, head = self._causal.base_model, self._head()
        assert isinstance(head, nn.Linear)
        # record_lengths goes through to the attention function.
        outputs = decoder(
            input_ids=batch.token_ids[None], position_ids=batch.positions[None], use_cache=False, record_lengths=batch.lengths
        )
        return sum_cross_entropy(outputs.last_hidden_state[0, batch.predictors], head, batch.targets)

    def _sum_one_by_one(self, batch: MicroBatch) -> torch.Tensor:
        total = torch.zeros((), device=batch.token_ids.device)
        start = 0
        for length in batch.lengths:
            inside = (batch.predictors >= start) & (batch.predictors < start + length)
            if inside.any():
                ids = batch.token_ids[None, start : start + length]
                logits = self._causal(input_ids=ids, use_cache=False, logits_to_keep=batch.predictors[inside] - start).logits[0]
                total = total + cross_entropy(logits.float(), batch.targets[inside], reduction="sum")
            start += length
        return total

    def _try_packing(self) -> None:
        """Turn packing on where it gives the model's own loss; a model that it does not fit keeps its own forward pass."""
        head = self._head()
        config = self._causal.config.get_text_config()
        fits = self._causal._supports_attention_backend and type(head) is nn.Linear and head.bias is None
        if not fits or (getattr(config, "attention_dropout", None) or 0.0) > 0.0:
            return
        own_attention = self._causal.config._attn_implementation
        was_training = self.model.training
        self.model.eval()
        with torch.no_grad():
            probe = _make_probe(config.vocab_size, self._causal.device)
            expected = float(self._sum_one_by_one(probe))
            register_packed_attention()
            self._causal.set_attn_implementation(PACKED_ATTENTION)
            got = float(self._sum_packed(probe))
        self.model.train(was_training)
        self.packed = abs(got - expected) <= PROBE_TOLERANCES[self._causal.dtype] * abs(expected)
        if not self.packed:
            self._causal.set_attn_implementation(own_attention)


def _make_probe(vocabulary: int, device: torch.device) -> MicroBatch:
    """Make a batch of fixed, scattered token ids, all but each record's first one trained."""
    total = sum(PROBE_LENGTHS)
    token_ids = (torch.arange(1, total + 1) * 7919) % vocabulary
    positions = torch.cat([torch.arange(length) for length in PROBE_LENGTHS])
    trained = torch.nonzero(positions)[:, 0]
    batch = MicroBatch(token_ids, positions, PROBE_LENGTHS, trained - 1, token_ids[trained])
    return batch.to(device)
