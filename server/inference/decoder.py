"""A causal language model made ready for batches of rows: row attention, merged layers, adapters, and the shape of its cache."""

from dataclasses import replace

import torch
from transformers import DynamicCache, PreTrainedModel

from server.basemodels.loading import count_context_tokens
from server.domain.errors import Unimplemented
from server.inference.attention import use_row_attention
from server.inference.cache import CacheShape, RowCache, Step
from server.inference.layers import fuse_layers, wrap_linears
from server.inference.lora import AdapterPool
from server.inference.precision import make_refiner
from server.inference.selection import AdapterSelection
from server.inference.stack import make_stack


class Decoder:
    """Runs forward passes of one model over rows of one cache. Takes the model over: it must not be used elsewhere afterwards."""

    def __init__(self, model: PreTrainedModel, *, max_adapter_ranks: int) -> None:
        config = model.config.get_text_config()
        if getattr(config, "alibi", False):
            raise _unsupported("its positions are linear biases (ALiBi)")
        self.vocabulary_size = int(config.vocab_size)
        self.context_tokens = count_context_tokens(model)
        self.weight_bytes = sum(parameter.nbytes for parameter in model.parameters())
        self._model = model
        with torch.inference_mode():
            self.cache_shape = _probe_cache(model, self.context_tokens)
            self._has_row_attention = use_row_attention(model)
            selection = AdapterSelection()
            places = fuse_layers(model, selection) if self._has_row_attention else {}
            places |= wrap_linears(model, selection)
            self._refiner = make_refiner(model)
            self._stack = make_stack(model, self.cache_shape) if self._has_row_attention else None
        self.embedding_width = int(config.hidden_size)
        shape = self.cache_shape
        self.adapters = AdapterPool(places, selection, dtype=shape.dtype, device=shape.device, max_ranks=max_adapter_ranks)

    @torch.inference_mode()
    def forward(self, token_ids: torch.Tensor, step: Step, cache: RowCache, *, wants_logits: bool) -> torch.Tensor | None:
        """Run new tokens [rows, new tokens]; give the logits [rows, vocabulary] after each row's last one, if wanted."""
        arguments = self._begin(step, cache)
        logits: torch.Tensor | None = None
        if self._stack is not None:
            logits = self._stack.run(token_ids, step, cache, wants_logits=wants_logits)
        elif wants_logits:
            logits = self._model(input_ids=token_ids, **arguments, logits_to_keep=1).logits[:, -1]
        else:
            self._model.base_model(input_ids=token_ids, **arguments)
        return self._refiner.refine(logits) if self._refiner is not None and logits is not None else logits

    @torch.inference_mode()
    def compute_prefix(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Run virtual tokens, given as embeddings [tokens, width], through the bare base; give their keys and values as a cache takes them.

        Belongs to the thread that steps this model.
        """
        tokens = embeddings.shape[0]
        cache = RowCache(replace(self.cache_shape, tokens_per_row=tokens), rows=1)
        positions = torch.arange(tokens, device=self.cache_shape.device).unsqueeze(0)
        self.adapters.select([None])
        arguments = self._begin(Step(0, positions, tokens, self.cache_shape.dtype), cache)
        self._model.base_model(inputs_embeds=embeddings.to(self.cache_shape.device, self.cache_shape.dtype).unsqueeze(0), **arguments)
        return cache.copy_row(0)

    def _begin(self, step: Step, cache: RowCache) -> dict[str, object]:
        cache.begin(step)
        arguments: dict[str, object] = {"position_ids": step.positions, "past_key_values": cache, "use_cache": True}
        if self._has_row_attention:
            arguments["step"] = step
        else:
            arguments["attention_mask"] = step.mask(None, 1)
        return arguments


def _probe_cache(model: PreTrainedModel, context_tokens: int) -> CacheShape:
    """Run one token and look what the model caches: modeling code differs too much to be read off configurations."""
    cache = DynamicCache(config=model.config)
    token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    try:
        model.base_model(input_ids=token, past_key_values=cache, use_cache=True)
        tensors = [(layer.keys, layer.values) for layer in cache.layers]  # type: ignore[union-attr]  # others raise AttributeError
    except (AttributeError, TypeError) as error:
        raise _unsupported("it keeps another state than keys and values") from error
    if any(keys is None or values is None for keys, values in tensors):
        raise _unsupported("some of its layers cache nothing")
    shapes = {tuple(tensor.shape) for pair in tensors for tensor in pair if tensor is not None}
    if len(shapes) != 1:
        raise _unsupported("its layers cache keys and values of different sizes")
    _, heads, _, head_size = shapes.pop()
    return CacheShape(len(tensors), heads, head_size, context_tokens, model.dtype, model.device)


def _unsupported(why: str) -> Unimplemented:
    return Unimplemented(f"The embedded engine cannot run this model: {why}.", reason="MODEL_NOT_SUPPORTED")
