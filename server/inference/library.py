"""The models that are loaded: base models with their batches, and adapters with their own tokenizers, dropped by last use.

Loading is blocking and happens in threads; which model leaves is decided here, when is decided by the engine.
"""

import logging
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from server.basemodels.loading import load_causal_model, load_tokenizer, preferred_dtype
from server.basemodels.rendering import find_stop_token_ids, render, render_completion
from server.domain.errors import InvalidInput, ResourceExhausted, ServiceError
from server.domain.generation import GenerationRequest, ModelReference
from server.inference.batching import Batch, BatchLimits, Generation
from server.inference.decoder import Decoder
from server.inference.lora import NamedAdapter, read_adapter
from server.inference.sampling import SamplingState
from server.inference.transcript import Transcript

# What a request without max_tokens gets, where the context has room for it.
DEFAULT_NEW_TOKENS = 512
# Seeds that the engine draws fit an int32, so that they survive JSON as numbers.
SEED_BITS = 31

logger = logging.getLogger(__name__)


class ResolvedBase(Protocol):
    """Where a base model lies (basemodels' ResolvedModel)."""

    @property
    def directory(self) -> Path:
        """A verified directory."""


class BaseModelResolver(Protocol):
    """Finds base models (basemodels' BaseModelSource)."""

    def resolve(self, base_model: str) -> ResolvedBase:
        """Give a verified local directory. Blocking. Raises ServiceError."""


# Gives the content-checked directory of a reference's adapter. Blocking. Raises ServiceError where it is gone or damaged.
AdapterResolver = Callable[[ModelReference], Path]


@dataclass(frozen=True)
class Voice:
    """What turns requests to tokens and back: a tokenizer with its chat template, and the tokens that end an answer."""

    tokenizer: PreTrainedTokenizerBase
    stop_ids: frozenset[int]


@dataclass(frozen=True)
class LoadedAdapter:
    """An adapter's matrices, and the voice that it was trained with."""

    model_id: str
    named: NamedAdapter
    voice: Voice


class LoadedModel:
    """A base model in memory with the batch of all requests to it."""

    def __init__(self, decoder: Decoder, voice: Voice, limits: BatchLimits) -> None:
        self.decoder, self.voice = decoder, voice
        self.batch = Batch(decoder, limits)
        self.context_tokens = decoder.context_tokens
        self.adapters: OrderedDict[str, LoadedAdapter] = OrderedDict()  # by name, least recently used first; they fit this model only
        self.users = 0  # requests between their arrival and their end; counted on the event loop
        self.last_use = 0.0

    def prepare(self, request_name: str, request: GenerationRequest, adapter: LoadedAdapter | None, received_seconds: float) -> Generation:
        """Render the prompt and fix what the request left open. Raises InvalidInput where the prompt leaves no room for an answer."""
        voice = adapter.voice if adapter is not None else self.voice
        if request.prompt is not None:
            prompt_ids = render_completion(voice.tokenizer, request.prompt).token_ids
        else:
            prompt_ids = render(voice.tokenizer, request.messages, add_generation_prompt=True).token_ids
        field_name = "messages" if request.prompt is None else "prompt"
        if not prompt_ids:
            raise InvalidInput.field(field_name, "is empty", "PROMPT_EMPTY")
        room = self.context_tokens - len(prompt_ids)
        if room < 1:
            description = f"has {len(prompt_ids)} tokens, and the model's context is {self.context_tokens}, one of which the answer needs"
            raise InvalidInput.field(field_name, description, "PROMPT_TOO_LONG")
        parameters = request.parameters
        seed = parameters.seed if parameters.seed is not None else secrets.randbits(SEED_BITS)
        return Generation(
            request_id=request_name,
            prompt_ids=prompt_ids,
            max_new_tokens=min(parameters.max_tokens or DEFAULT_NEW_TOKENS, room),
            stop_ids=voice.stop_ids,
            sampling=SamplingState(parameters, seed, prompt_ids),
            transcript=Transcript(voice.tokenizer, parameters.stop),
            adapter=None if adapter is None else adapter.named,
            received_seconds=received_seconds,
        )


@dataclass(frozen=True)
class LoadingOptions:
    """How models are loaded. dtype None: what the device multiplies natively."""

    limits: BatchLimits
    max_adapter_ranks: int = 256
    dtype: torch.dtype | None = None
    device: str = "cpu"


def load_model(directory: Path, options: LoadingOptions) -> LoadedModel:
    """Load a base model from a verified directory. Raises ServiceError; memory that runs out is ResourceExhausted."""
    start = time.monotonic()
    try:
        tokenizer = load_tokenizer(directory)
        model = load_causal_model(directory, dtype=options.dtype or preferred_dtype(options.device), device=options.device)
        stop_ids = find_stop_ids(tokenizer, model.generation_config)
        decoder = Decoder(_freeze(model), max_adapter_ranks=options.max_adapter_ranks)
        loaded = LoadedModel(decoder, Voice(tokenizer, stop_ids), options.limits)
    except (MemoryError, torch.OutOfMemoryError, OSError) as error:
        logger.error("loading a model failed", exc_info=error)
        raise ResourceExhausted("The engine has no memory for this model.", reason="ENGINE_OUT_OF_MEMORY") from error
    logger.info("model loaded in %.1f s, %d MiB of weights", time.monotonic() - start, decoder.weight_bytes >> 20)
    return loaded


def load_adapter(name: str, model_id: str, directory: Path, model: LoadedModel) -> LoadedAdapter:
    """Load an adapter for a model that is loaded, with its tokenizer where it brings one. Raises ServiceError."""
    start = time.monotonic()
    adapter = read_adapter(directory, model.decoder.adapters.places)
    voice = model.voice
    if (directory / "tokenizer_config.json").exists():
        tokenizer = load_tokenizer(directory)
        voice = Voice(tokenizer, find_stop_ids(tokenizer, None))
    logger.info("adapter of rank %d loaded in %.2f s", adapter.rank, time.monotonic() - start)
    return LoadedAdapter(model_id, NamedAdapter(name, adapter), voice)


def find_stop_ids(tokenizer: PreTrainedTokenizerBase, generation_config: GenerationConfig | None) -> frozenset[int]:
    """Gather the tokens that end an answer: the tokenizer's end, the end of an assistant turn, and the model's own list."""
    end = tokenizer.eos_token_id
    found = {end} if isinstance(end, int) else set(end or [])
    try:
        found |= find_stop_token_ids(tokenizer)
    except ServiceError:
        # A base model's template that cannot even render a probe: prompts still work, and end at the end token.
        logger.warning("the chat template renders no probe: only the end token ends an answer")
    listed = generation_config.eos_token_id if generation_config is not None else None
    return frozenset(found | ({listed} if isinstance(listed, int) else set(listed or [])))


def _freeze(model: PreTrainedModel) -> PreTrainedModel:
    model.requires_grad_(False)
    model.train(False)
    return model
