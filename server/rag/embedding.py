"""Turns texts into unit vectors with any embedding model on disk (torch). Knows no database and no documents."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from server.domain.catalogue import Pooling
from server.domain.errors import ServiceError
from server.domain.generation import EmbedRole
from server.rag.profiles import EmbeddingProfile, canonical_name, check_supported, read_profile, refuse
from server.rag.tokenization import EmbeddingTokenizer

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

Vectors = npt.NDArray[np.float32]

# Tokens in one forward pass, padding included: small enough for a CPU's caches (measured on MiniLM), large enough to fill a GPU.
TOKENS_PER_BATCH = {"cpu": 2_048, "cuda": 65_536}
MAX_LOADED_MODELS = 2


class _Encoder(Protocol):
    """A model that gives one vector per sequence of token ids."""

    def encode(self, texts: Sequence[str], role: EmbedRole) -> Vectors:
        """Give float32 [texts, dimension], each row of length 1."""


class LoadedModel:
    """An embedding model in memory, with its tokenizer and its facts."""

    def __init__(self, profile: EmbeddingProfile, tokenizer: EmbeddingTokenizer, encoder: _Encoder, dimension: int) -> None:
        self.profile = profile
        self.tokenizer = tokenizer
        self.encoder = encoder
        self.dimension = dimension


class Embedder:
    """Holds a few embedding models in memory and embeds with them. Any thread may call it."""

    def __init__(
        self, resolve: Callable[[str], Path], *, device: str = "cpu", max_loaded_models: int = MAX_LOADED_MODELS
    ) -> None:  # fmt: skip
        """`resolve` gives the checked local directory of an embedding model (hub name, alias or path); its errors go to the caller."""
        self._resolve = resolve
        self._device = torch.device(device)
        self._max_loaded_models = max_loaded_models
        self._loaded: OrderedDict[str, LoadedModel] = OrderedDict()
        self._lock = threading.Lock()
        self._loading = threading.Lock()

    def embed(self, embedding_model: str, texts: Sequence[str], role: EmbedRole) -> Vectors:
        """Embed to float32 [texts, dimension], each row of length 1; text beyond what the model reads is cut off.

        Raises FailedPrecondition where the model cannot be used here, and whatever `resolve` raises.
        """
        loaded = self.load(embedding_model)
        if not texts:
            return np.zeros((0, loaded.dimension), dtype=np.float32)
        return loaded.encoder.encode(texts, role)

    def load(self, embedding_model: str) -> LoadedModel:
        """Give the model, loaded at first use; the one that was not used for longest is dropped. Raises as `embed` does."""
        name = canonical_name(embedding_model)
        if found := self._find(name):
            return found
        with self._loading:
            if found := self._find(name):
                return found
            check_supported(name)
            loaded = _load(name, self._resolve(name), self._device)
            with self._lock:
                self._loaded[name] = loaded
                while len(self._loaded) > self._max_loaded_models:
                    self._loaded.popitem(last=False)
            return loaded

    def _find(self, name: str) -> LoadedModel | None:
        with self._lock:
            if name in self._loaded:
                self._loaded.move_to_end(name)
            return self._loaded.get(name)


def _load(embedding_model: str, directory: Path, device: torch.device) -> LoadedModel:
    profile = read_profile(embedding_model, directory)
    try:
        if profile.pooling is None:
            return _load_by_library(profile, directory, device)
        return _load_transformer(profile, directory / profile.transformer_path, device)
    except (ServiceError, MemoryError):
        raise
    except Exception as error:
        # Whatever a broken directory makes the libraries raise means one thing to the caller; the log has the cause.
        raise refuse(embedding_model, "cannot be loaded as an embedding model") from error


def _load_transformer(profile: EmbeddingProfile, directory: Path, device: torch.device) -> LoadedModel:
    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    model = AutoModel.from_pretrained(directory, local_files_only=True, trust_remote_code=False, use_safetensors=True, dtype=torch.float32)
    model = cast(PreTrainedModel, model.to(device).eval())
    own = _wrap_tokenizer(tokenizer, profile)
    encoder = _TransformerEncoder(model, own, profile.pooling or Pooling.MEAN, int(tokenizer.pad_token_id or 0))
    return LoadedModel(profile, own, encoder, int(model.config.hidden_size))


def _load_by_library(profile: EmbeddingProfile, directory: Path, device: torch.device) -> LoadedModel:
    # A late import: the library takes seconds, and few models need it.
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(
        str(directory), device=str(device), local_files_only=True, trust_remote_code=False,
        model_kwargs={"use_safetensors": True, "dtype": torch.float32},
    )  # fmt: skip
    own = _wrap_tokenizer(model.tokenizer, profile)
    dimension = model.get_embedding_dimension()
    if dimension is None:
        raise ValueError("the model does not say how long its vectors are")
    return LoadedModel(profile, own, _LibraryEncoder(model, profile), dimension)


def _wrap_tokenizer(tokenizer: PreTrainedTokenizerBase, profile: EmbeddingProfile) -> EmbeddingTokenizer:
    if not tokenizer.is_fast:
        raise refuse(profile.embedding_model, "has no tokenizer.json, and without it no offsets")
    return EmbeddingTokenizer(tokenizer.backend_tokenizer, profile)


class _TransformerEncoder:
    """A transformer, pooled and normalised here: batches of like length, filled by tokens and not by texts."""

    def __init__(self, model: PreTrainedModel, tokenizer: EmbeddingTokenizer, pooling: Pooling, pad_id: int) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._pooling = pooling
        self._pad_id = pad_id

    @torch.inference_mode()
    def encode(self, texts: Sequence[str], role: EmbedRole) -> Vectors:
        """Give float32 [texts, dimension], each row of length 1."""
        sequences = self._tokenizer.encode(texts, role)
        order = sorted(range(len(sequences)), key=lambda place: len(sequences[place]), reverse=True)
        vectors = np.empty((len(sequences), int(self._model.config.hidden_size)), dtype=np.float32)
        for batch in _batch(order, sequences, TOKENS_PER_BATCH.get(self._model.device.type, TOKENS_PER_BATCH["cpu"])):
            vectors[batch] = self._encode_batch([sequences[place] for place in batch]).numpy(force=True)
        return vectors

    def _encode_batch(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        """Give float32 [sequences, dimension] for sequences of falling length."""
        width = len(sequences[0])
        device = self._model.device
        padded = [[*ids, *[self._pad_id] * (width - len(ids))] for ids in sequences]
        mask = None
        if len(sequences[-1]) < width:
            lengths = torch.tensor([len(ids) for ids in sequences], device=device)
            mask = (torch.arange(width, device=device) < lengths[:, None]).long()
        # Without padding no mask is given at all: attention is faster so.
        states = self._model(input_ids=torch.tensor(padded, device=device), attention_mask=mask).last_hidden_state
        return torch.nn.functional.normalize(_pool(states, mask, self._pooling).float(), dim=-1)


def _batch(order: Sequence[int], sequences: Sequence[Sequence[int]], tokens_per_batch: int) -> list[list[int]]:
    """Cut places in falling order of length into batches of at most so many tokens, padding included; of one text at least."""
    batches: list[list[int]] = []
    room = 0
    for place in order:
        if room <= 0:
            batches.append([])
            room = max(1, tokens_per_batch // max(1, len(sequences[place])))
        batches[-1].append(place)
        room -= 1
    return batches


def _pool(states: Tensor, mask: Tensor | None, pooling: Pooling) -> Tensor:
    """Make [texts, dimension] of [texts, tokens, dimension], up to length; padding (mask 0) counts nothing."""
    if pooling is Pooling.CLS:
        return states[:, 0]
    # The sum points where the mean does, and only the direction is kept.
    return states.sum(dim=1) if mask is None else (states * mask[:, :, None]).sum(dim=1)


class _LibraryEncoder:
    """Modules that only Sentence Transformers can run (dense layers, other poolings)."""

    def __init__(self, model: "SentenceTransformer", profile: EmbeddingProfile) -> None:
        self._model = model
        self._profile = profile
        # Its tokenizer changes its settings in each call.
        self._lock = threading.Lock()

    def encode(self, texts: Sequence[str], role: EmbedRole) -> Vectors:
        """Give float32 [texts, dimension], each row of length 1."""
        prefix = self._profile.query_prefix if role is EmbedRole.QUERY else self._profile.passage_prefix
        with self._lock:
            vectors = self._model.encode(list(texts), prompt=prefix, normalize_embeddings=True, show_progress_bar=False)
        return np.asarray(vectors, dtype=np.float32)
