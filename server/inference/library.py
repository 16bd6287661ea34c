"""The models that are loaded: base models with their batches, and adapters with their own tokenizers, dropped by last use.

Loading is blocking and happens in threads; which model leaves is decided here, when is decided by the engine.
"""

import json
import logging
import math
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch
from transformers import PreTrainedModel

from server.basemodels.loading import load_causal_model, load_tokenizer, preferred_dtype
from server.childprocess import is_out_of_memory
from server.domain.errors import ResourceExhausted, ServiceError
from server.domain.generation import GenerationRequest, ModelReference
from server.inference.adapterfiles import read_embeddings, read_key_values, read_low_rank
from server.inference.batching import Batch, BatchLimits
from server.inference.decoder import Decoder
from server.inference.generations import Generation
from server.inference.lora import NamedAdapter
from server.inference.plans import Addition, Opened, ServingPlan, VersionFiles, Weights
from server.inference.prompts import PromptBuilder
from server.inference.sampling import SamplingState
from server.inference.transcript import Transcript
from server.inference.voice import Voice, check_golden_tokens

MAX_HEADER_BYTES = 100_000_000  # of a safetensors file, by its own definition

logger = logging.getLogger(__name__)


class ResolvedBase(Protocol):
    """Where a base model lies (basemodels' ResolvedModel)."""

    @property
    def directory(self) -> Path:
        """A verified directory."""

    @property
    def revision(self) -> str:
        """What ties a version to exactly these weights."""


class BaseModelResolver(Protocol):
    """Finds base models (basemodels' BaseModelSource)."""

    def resolve(self, base_model: str, revision: str | None = None) -> ResolvedBase:
        """Give a verified local directory, of that revision where one is named. Blocking. Raises ServiceError, where it is gone too."""


@dataclass(eq=False)
class LoadedAdapter:
    """What a version adds to shared weights, matrices or a prefix of virtual tokens, and the voice that it was trained with.

    `users` are requests between their arrival and their end, counted on the event loop as a model's are.
    """

    model_id: str
    voice: Voice
    matrices: NamedAdapter | None = None
    prefix: torch.Tensor | None = None
    users: int = 0
    last_use: float = field(default_factory=time.monotonic)

    @cached_property
    def size_bytes(self) -> int:
        """What it keeps in memory beside the copy in the pool, whose size is that of its ranks."""
        pairs = () if self.matrices is None else self.matrices.adapter.matrices.values()
        return sum(matrix.nbytes for pair in pairs for matrix in pair) + (0 if self.prefix is None else self.prefix.nbytes)

    @property
    def prefix_tokens(self) -> int:
        """Virtual tokens before each prompt."""
        return 0 if self.prefix is None else self.prefix.shape[2]


@dataclass(frozen=True, slots=True)
class Times:
    """When a request arrived (time.monotonic), and how long it waited for weights and adapter, in seconds."""

    received_seconds: float
    load_seconds: float = 0.0
    adapter_load_seconds: float = 0.0


class LoadedModel:
    """Weights in memory with the batch of all requests to them."""

    def __init__(self, decoder: Decoder, voice: Voice, limits: BatchLimits) -> None:
        self.decoder, self.voice = decoder, voice
        self.batch = Batch(decoder, limits)
        self.context_tokens = decoder.context_tokens
        self.adapters: OrderedDict[str, LoadedAdapter] = OrderedDict()  # by name, least recently used first; they fit this model only
        self.users = 0  # requests between their arrival and their end; counted on the event loop
        self.last_use = 0.0
        self.is_forgotten = False  # its version was deleted: it leaves with its last user

    def count_context_tokens(self, adapter: LoadedAdapter | None) -> int:
        """Give what prompts and answers have of the context: virtual tokens take their part."""
        return self.context_tokens - (0 if adapter is None else adapter.prefix_tokens)

    def prepare(self, request_name: str, request: GenerationRequest, adapter: LoadedAdapter | None, times: Times) -> Generation:
        """Render the prompt and fix what the request left open. Raises InvalidInput where the prompt leaves no room for an answer."""
        voice = adapter.voice if adapter is not None else self.voice
        prepared = voice.prepare(request, self.count_context_tokens(adapter), self.decoder.vocabulary_size)
        prompt_ids = prepared.prompt.token_ids
        return Generation(
            request_id=request_name,
            prompt_ids=prompt_ids,
            max_new_tokens=prepared.max_new_tokens,
            stop_ids=voice.stop_ids,
            sampling=SamplingState(request.parameters, prepared.seed, prompt_ids, prepared.form),
            transcript=Transcript(voice.tokenizer, request.parameters.stop),
            adapter=None if adapter is None else adapter.matrices,
            prefix=None if adapter is None else adapter.prefix,
            priority=request.priority,
            received_seconds=times.received_seconds,
            load_seconds=times.load_seconds,
            adapter_load_seconds=times.adapter_load_seconds,
            dropped_messages=prepared.prompt.dropped_messages,
            rendered_prompt=prepared.prompt.text if request.echo_prompt else None,
            choice_of=request.choice_of,
        )


@dataclass(frozen=True)
class LoadingOptions:
    """How models are loaded. dtype None: what the device multiplies natively."""

    limits: BatchLimits
    max_adapter_ranks: int = 256
    dtype: torch.dtype | None = None
    device: str = "cpu"


@dataclass(frozen=True)
class WeightFiles:
    """The checked directories that weights are made of: a base model's, and a version's where they are its own."""

    base: Path
    version: Path | None = None
    described: Mapping[str, object] = field(default_factory=dict)  # what the version's manifest says

    def measure_bytes(self, options: LoadingOptions) -> int:
        """Give what the weights take in memory once they are loaded: their numbers in the type that they are loaded as. Blocking."""
        whole = self.version is not None and (self.version / "config.json").exists()
        directory = self.version if self.version is not None and whole else self.base
        numbers = sum(_count_numbers(file) for file in directory.glob("*.safetensors"))
        return numbers * (options.dtype or preferred_dtype(options.device)).itemsize


def _count_numbers(file: Path) -> int:
    """Read the shapes of a safetensors file's header, without mapping the file: it may not fit. What is damaged counts nothing here."""
    try:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(min(length, MAX_HEADER_BYTES)))
        return sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return 0  # loading it says what is wrong


def find_files(plan: ServingPlan, reference: ModelReference, bases: BaseModelResolver, versions: VersionFiles) -> WeightFiles:
    """Find and check the files of a plan's weights. Blocking: every byte of a version is read. Raises ServiceError."""
    if not plan.weights.version:
        return WeightFiles(bases.resolve(reference.base_model, plan.weights.revision or None).directory)
    opened = versions.open(reference.adapter_path or "", reference.manifest_sha256)
    version, described = opened.directory, opened.description
    if not plan.is_merged:
        return WeightFiles(version, version, described)
    return WeightFiles(bases.resolve(reference.base_model, plan.weights.revision or None).directory, version, described)


def load_model(files: WeightFiles, plan: ServingPlan, options: LoadingOptions) -> LoadedModel:
    """Load weights from verified directories. Raises ServiceError; memory that runs out is ResourceExhausted."""
    start = time.monotonic()
    try:
        voice_directory = files.version or files.base
        tokenizer = load_tokenizer(voice_directory)
        check_golden_tokens(PromptBuilder(tokenizer), files.described)
        model = _load_weights(files, plan, options)
        # An adapter's tokenizer knows how its answers end; what its base ended at does not count any more.
        voice = Voice.make(tokenizer, None if plan.is_merged else model.generation_config)
        decoder = Decoder(_freeze(model), max_adapter_ranks=options.max_adapter_ranks)
        loaded = LoadedModel(decoder, voice, options.limits)
    except (MemoryError, RuntimeError, OSError, ServiceError) as error:
        if not is_out_of_memory(error):
            raise
        logger.error("loading a model failed", exc_info=error)
        raise ResourceExhausted("The engine has no memory for this model.", reason="ENGINE_OUT_OF_MEMORY") from error
    logger.info("model loaded in %.1f s, %d MiB of weights", time.monotonic() - start, decoder.weight_bytes >> 20)
    return loaded


def _load_weights(files: WeightFiles, plan: ServingPlan, options: LoadingOptions) -> PreTrainedModel:
    model = load_causal_model(files.base, dtype=options.dtype or preferred_dtype(options.device), device=options.device)
    weights: Weights = plan.weights
    # bitsandbytes and peft take seconds to import: most engines never need them.
    if weights.quantization is not None:
        from server.basemodels.quantization import dequantize_in_place

        dequantize_in_place(model, weights.quantization, weights.double_quantization)
    if plan.is_merged and files.version is not None:
        from server.basemodels.merging import attach_adapter, merge_adapter

        model = merge_adapter(attach_adapter(model, files.version))
    return model


@dataclass(frozen=True)
class AdapterFiles:
    """What a version's files say: matrices or prefix as they are, or embeddings that the model must still turn to a prefix."""

    voice: Voice
    matrices: NamedAdapter | None = None
    prefix: torch.Tensor | None = None
    embeddings: torch.Tensor | None = None


def read_adapter(plan: ServingPlan, version: Opened, model: LoadedModel) -> AdapterFiles:
    """Read what a version adds to a model that is loaded, and its tokenizer where it brings one. Raises ServiceError."""
    start, directory, decoder, voice = time.monotonic(), version.directory, model.decoder, model.voice
    if (directory / "tokenizer_config.json").exists():
        voice = Voice.make(load_tokenizer(directory))
    check_golden_tokens(voice.prompts, version.description)
    match plan.addition:
        case Addition.EMBEDDINGS:
            read = AdapterFiles(voice, embeddings=read_embeddings(directory, decoder.embedding_width))
        case Addition.KEY_VALUES:
            read = AdapterFiles(voice, prefix=read_key_values(directory, decoder.cache_shape))
        case _:
            read = AdapterFiles(voice, NamedAdapter(plan.name, read_low_rank(directory, decoder.adapters.places)))
    logger.info("adapter (%s) read in %.2f s", plan.addition.value, time.monotonic() - start)
    return read


def _freeze(model: PreTrainedModel) -> PreTrainedModel:
    model.requires_grad_(False)
    model.train(False)
    return model
