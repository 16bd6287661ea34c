"""The learned tokens of prompt learning, laid before each record of a packed batch as peft lays them before a record of its own."""

from dataclasses import dataclass

import torch
from peft import PeftModel, PeftType
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from server.training.batches import MicroBatch


@dataclass(frozen=True, slots=True)
class PackedInputs:
    """What the model's body is called with, and where in its output the predictors of trained tokens are."""

    arguments: dict[str, object]
    predictors: torch.Tensor  # [N] int64


class VirtualTokens:
    """Those of one model: embeddings before the records', or keys and values before those of every layer."""

    def __init__(self, model: PeftModel) -> None:
        self._model = model
        config = model.active_peft_config
        self.count = int(config.num_virtual_tokens)
        self._as_prefix = config.peft_type is PeftType.PREFIX_TUNING

    @property
    def places(self) -> int:
        """The places that they take in the model's output for a record."""
        return 0 if self._as_prefix else self.count

    def pack(self, batch: MicroBatch) -> PackedInputs:
        """Give the inputs for a batch."""
        return self._pack_prefix(batch) if self._as_prefix else self._pack_embeddings(batch)

    def _pack_prefix(self, batch: MicroBatch) -> PackedInputs:
        cache = self._model.get_prompt(batch_size=1)
        assert isinstance(cache, DynamicCache)
        prefixes = [(layer.keys, layer.values) for layer in cache.layers if isinstance(layer, DynamicLayer)]
        arguments = {"input_ids": batch.token_ids[None], "position_ids": batch.positions[None] + self.count}
        return PackedInputs({**arguments, "record_lengths": batch.lengths, "record_prefixes": prefixes}, batch.predictors)

    def _pack_embeddings(self, batch: MicroBatch) -> PackedInputs:
        base = self._model.get_base_model()
        assert isinstance(base, PreTrainedModel)
        embeddings: torch.Tensor = base.get_input_embeddings()(batch.token_ids)
        prompt = self._model.get_prompt(batch_size=1)[0].to(embeddings.dtype)
        records = torch.split(embeddings, list(batch.lengths))
        lengths = tuple(self.count + length for length in batch.lengths)
        device = embeddings.device
        # The number of the record that a predictor belongs to: as many prompts stand before it, and its own.
        ends = torch.tensor(batch.lengths, device=device).cumsum(0)
        records_before = torch.bucketize(batch.predictors, ends, right=True)
        arguments = {
            "inputs_embeds": torch.cat([part for record in records for part in (prompt, record)])[None],
            "position_ids": torch.cat([torch.arange(length, device=device) for length in lengths])[None],
            "record_lengths": lengths,
        }
        return PackedInputs(arguments, batch.predictors + self.count * (records_before + 1))


def find_virtual_tokens(model: torch.nn.Module) -> VirtualTokens | None:
    """Give a model's virtual tokens; None where it has none."""
    return VirtualTokens(model) if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning else None
