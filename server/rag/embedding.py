"""Turns texts into unit vectors with any embedding model on disk (torch). Knows no database and no documents."""

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

import numpy as np
import numpy.typing as npt
import psutil
import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from server.domain.catalogue import Pooling
from server.domain.embeddings import EmbeddingBackend, Embeddings
from server.domain.errors import ServiceError
from server.domain.generation import EmbedRole
from server.rag.batches import cut_batches
from server.rag.integers import multiplies_bytes, quantize_linears
from server.rag.profiles import EmbeddingProfile, canonical_name, check_supported, read_profile, refuse
from server.rag.shelf import FLOAT32, NumberBytes, Shelf
from server.rag.spaces import describe_space, read_revision
from server.rag.tokenization import EmbeddingTokenizer

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

Vectors = npt.NDArray[np.float32]

# Tokens in one forward pass, padding included: small enough for a CPU's caches (measured on MiniLM), large enough to fill a GPU.
TOKENS_PER_BATCH = {"cpu": 2_048, "cuda": 65_536}
# Sums of bytes take 32 bits, and leave the caches sooner: 128 passages per second of one core against 88 with as many tokens as above.
INTEGER_TOKENS_PER_BATCH = 512
# Texts that are sorted by length together: of mixed length 256 leave 6 % padding, 64 leave 19 % (GSM8K). For a large model fewer, so that
# progress and a cancel come within some ten seconds of two cores' work.
MAX_TEXTS_PER_WINDOW, MIN_TEXTS_PER_WINDOW = 256, 16
WINDOW_FLOPS = 2e12
WINDOW_TEXT_TOKENS = 256
_DTYPES = {EmbeddingBackend.FLOAT32: torch.float32, EmbeddingBackend.BFLOAT16: torch.bfloat16, EmbeddingBackend.INT8: torch.float32}
# What a model in INT8 is held against when it is loaded: short and long, Latin and Arabic. MiniLM loses less than 0.01 of the cosine.
_PROBES = ("The maps lie in a blue house.", "Who keeps them?", "الخرائط في بيت أزرق قرب الجسر القديم.", "3.5 litres of oil and a pump " * 8)
LEAST_COSINE = 0.95
_NUMBERS = {EmbeddingBackend.FLOAT32: FLOAT32, EmbeddingBackend.BFLOAT16: NumberBytes(2, 2), EmbeddingBackend.INT8: NumberBytes(1, 4)}


class _Encoder(Protocol):
    """A model that gives one vector per text. `weight_count`: of what computes, without the table of words."""

    weight_count: int

    def encode_counted(self, texts: Sequence[str], role: EmbedRole) -> tuple[Vectors, list[int]]:
        """Give float32 [texts, dimension], each row of length 1, and the tokens of each whole text."""


class LoadedModel:
    """An embedding model in memory, with its tokenizer and its facts."""

    def __init__(
        self, profile: EmbeddingProfile, tokenizer: EmbeddingTokenizer, encoder: _Encoder, dimension: int, revision: str,
        backend: EmbeddingBackend = EmbeddingBackend.FLOAT32,
    ) -> None:  # fmt: skip
        self.space = describe_space(profile, dimension, revision, f"torch-{backend.lower()}")
        self.profile = profile
        self.tokenizer = tokenizer
        self._encoder = encoder
        self.dimension = dimension

    @property
    def texts_per_window(self) -> int:
        """How many passages are best embedded together."""
        fitting = int(WINDOW_FLOPS / (2 * WINDOW_TEXT_TOKENS * max(1, self._encoder.weight_count)))
        return max(MIN_TEXTS_PER_WINDOW, min(MAX_TEXTS_PER_WINDOW, fitting))

    def encode(self, texts: Sequence[str], role: EmbedRole) -> Vectors:
        """Give float32 [texts, dimension], each row of length 1; text beyond what the model reads is cut off."""
        return self.encode_counted(texts, role)[0]

    def encode_counted(self, texts: Sequence[str], role: EmbedRole) -> tuple[Vectors, list[int]]:
        """Do the same, and give the tokens of each whole text, special ones and prefix included."""
        if not texts:
            return np.zeros((0, self.dimension), dtype=np.float32), []
        return self._encoder.encode_counted(texts, role)


class Embedder:
    """Embeds with models that are loaded at first use and held on a shelf. Any thread may call it."""

    def __init__(
        self, resolve: Callable[[str], Path], shelf: Shelf | None = None, *, device: str = "cpu", hashes_path: Path | None = None
    ) -> None:  # fmt: skip
        """`resolve` gives the checked local directory of an embedding model (hub name, alias or path); its errors go to the caller.

        Without a shelf the models may take all of the machine's memory. `hashes_path` is where the hashes of models' files are kept
        (see spaces); without it they are computed at each load.
        """
        self._hashes_path = hashes_path
        self._resolve = resolve
        self._shelf = shelf or Shelf(psutil.virtual_memory().total)
        self._device = torch.device(device)

    def embed(self, embedding_model: str, texts: Sequence[str], role: EmbedRole) -> Vectors:
        """Embed to float32 [texts, dimension], each row of length 1; text beyond what the model reads is cut off.

        Raises FailedPrecondition where the model cannot be used here, ResourceExhausted where it does not fit into the memory, and
        whatever `resolve` raises.
        """
        return self.load(embedding_model).encode(texts, role)

    def embed_texts(
        self, embedding_model: str, texts: Sequence[str], role: EmbedRole, backend: EmbeddingBackend = EmbeddingBackend.FLOAT32
    ) -> Embeddings:
        """Do the same, and tell how many tokens the texts have, and in which space their vectors are."""
        loaded = self.load(embedding_model, backend)
        vectors, token_counts = loaded.encode_counted(texts, role)
        listed = cast("list[list[float]]", vectors.tolist())
        return Embeddings(listed, loaded.dimension, token_counts, loaded.profile.max_tokens, loaded.space.fingerprint)

    def is_loaded(self, embedding_model: str, backend: EmbeddingBackend = EmbeddingBackend.FLOAT32) -> bool:
        """Tell whether the model is in memory."""
        return self._shelf.has(LoadedModel, f"{canonical_name(embedding_model)} {backend}")

    def load(self, embedding_model: str, backend: EmbeddingBackend = EmbeddingBackend.FLOAT32) -> LoadedModel:
        """Give the model, loaded at first use; the one that was not used for longest is dropped. Raises as `embed` does."""
        name = canonical_name(embedding_model)

        def find() -> Path:
            check_supported(name)
            if backend is EmbeddingBackend.INT8:
                _check_bytes(name, self._device)
            return self._resolve(name)

        def load(directory: Path) -> LoadedModel:
            return _load(name, directory, self._device, backend, read_revision(directory, self._hashes_path))

        return self._shelf.take(LoadedModel, f"{name} {backend}", find, load, _NUMBERS[backend])


def _check_bytes(embedding_model: str, device: torch.device) -> None:
    if device.type != "cpu" or not multiplies_bytes():
        why = "cannot be computed in INT8 here: that takes a processor with VNNI or AMX. Use FLOAT32 or BFLOAT16"
        raise refuse(embedding_model, why, "EMBEDDING_BACKEND_UNSUPPORTED")


def _load(embedding_model: str, directory: Path, device: torch.device, backend: EmbeddingBackend, revision: str) -> LoadedModel:
    profile = read_profile(embedding_model, directory)
    try:
        if profile.pooling is None:
            model, loaded = _load_by_library(profile, directory, device, backend, revision)
        else:
            model, loaded = _load_transformer(profile, directory / profile.transformer_path, device, backend, revision)
        if backend is EmbeddingBackend.INT8:
            _make_integers(model, loaded)
        return loaded
    except (ServiceError, MemoryError):
        raise
    except Exception as error:
        # Whatever a broken directory makes the libraries raise means one thing to the caller; the log has the cause.
        raise refuse(embedding_model, "cannot be loaded as an embedding model") from error


def _make_integers(model: torch.nn.Module, loaded: LoadedModel) -> None:
    """Let its linear layers compute with bytes. Raises FailedPrecondition where its vectors become others."""
    exact = loaded.encode(_PROBES, EmbedRole.PASSAGE)
    if not quantize_linears(model):
        raise refuse(loaded.profile.embedding_model, "has no layers that INT8 could compute: use FLOAT32", "EMBEDDING_BACKEND_UNSUPPORTED")
    least = float((exact * loaded.encode(_PROBES, EmbedRole.PASSAGE)).sum(axis=1).min())
    # Put so that it also catches what is no number.
    if not least >= LEAST_COSINE:
        why = f"loses too much in INT8 (cosine {least:.3f} to its own vectors, not {LEAST_COSINE}): use FLOAT32 or BFLOAT16"
        raise refuse(loaded.profile.embedding_model, why, "EMBEDDING_BACKEND_UNSUPPORTED")


def _load_transformer(
    profile: EmbeddingProfile, directory: Path, device: torch.device, backend: EmbeddingBackend, revision: str
) -> tuple[PreTrainedModel, LoadedModel]:
    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    dtype = _DTYPES[backend]
    model = AutoModel.from_pretrained(directory, local_files_only=True, trust_remote_code=False, use_safetensors=True, dtype=dtype)
    model = cast(PreTrainedModel, model.to(device).eval())
    own = _wrap_tokenizer(tokenizer, profile)
    at_once = INTEGER_TOKENS_PER_BATCH if backend is EmbeddingBackend.INT8 else TOKENS_PER_BATCH.get(device.type, TOKENS_PER_BATCH["cpu"])
    encoder = _TransformerEncoder(model, own, profile.pooling or Pooling.MEAN, int(tokenizer.pad_token_id or 0), at_once)
    return model, LoadedModel(profile, own, encoder, int(model.config.hidden_size), revision, backend)


def _load_by_library(
    profile: EmbeddingProfile, directory: Path, device: torch.device, backend: EmbeddingBackend, revision: str
) -> tuple[torch.nn.Module, LoadedModel]:
    # A late import: the library takes seconds, and few models need it.
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(
        str(directory), device=str(device), local_files_only=True, trust_remote_code=False,
        model_kwargs={"use_safetensors": True, "dtype": _DTYPES[backend]},
    )  # fmt: skip
    own = _wrap_tokenizer(model.tokenizer, profile)
    dimension = model.get_embedding_dimension()
    if dimension is None:
        raise ValueError("the model does not say how long its vectors are")
    return model, LoadedModel(profile, own, _LibraryEncoder(model, own, profile), dimension, revision, backend)


def _wrap_tokenizer(tokenizer: PreTrainedTokenizerBase, profile: EmbeddingProfile) -> EmbeddingTokenizer:
    if not tokenizer.is_fast:
        raise refuse(profile.embedding_model, "has no tokenizer.json, and without it no offsets")
    return EmbeddingTokenizer(tokenizer.backend_tokenizer, profile)


class _TransformerEncoder:
    """A transformer, pooled and normalised here: batches of like length, filled by tokens and not by texts."""

    def __init__(self, model: PreTrainedModel, tokenizer: EmbeddingTokenizer, pooling: Pooling, pad_id: int, tokens_per_batch: int) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._pooling = pooling
        self._pad_id = pad_id
        self._tokens_per_batch = tokens_per_batch
        self.weight_count = _count_weights(model)

    @torch.inference_mode()
    def encode_counted(self, texts: Sequence[str], role: EmbedRole) -> tuple[Vectors, list[int]]:
        """Give float32 [texts, dimension], each row of length 1, and the tokens of each whole text."""
        sequences, token_counts = self._tokenizer.encode(texts, role)
        vectors = np.empty((len(sequences), int(self._model.config.hidden_size)), dtype=np.float32)
        for batch in cut_batches([len(ids) for ids in sequences], self._tokens_per_batch):
            vectors[batch] = self._encode_batch([sequences[place] for place in batch]).numpy(force=True)
        return vectors, token_counts

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
        states = self._model(input_ids=torch.tensor(padded, device=device), attention_mask=mask).last_hidden_state.float()
        return torch.nn.functional.normalize(_pool(states, mask, self._pooling), dim=-1)


def _count_weights(model: torch.nn.Module) -> int:
    return sum(weight.numel() for name, weight in model.named_parameters() if "embeddings" not in name)


def _pool(states: Tensor, mask: Tensor | None, pooling: Pooling) -> Tensor:
    """Make [texts, dimension] of [texts, tokens, dimension], up to length; padding (mask 0) counts nothing."""
    if pooling is Pooling.CLS:
        return states[:, 0]
    # The sum points where the mean does, and only the direction is kept.
    return states.sum(dim=1) if mask is None else (states * mask[:, :, None]).sum(dim=1)


class _LibraryEncoder:
    """Modules that only Sentence Transformers can run (dense layers, other poolings)."""

    def __init__(self, model: "SentenceTransformer", tokenizer: EmbeddingTokenizer, profile: EmbeddingProfile) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._profile = profile
        self.weight_count = _count_weights(model)
        # Its tokenizer changes its settings in each call.
        self._lock = threading.Lock()

    def encode_counted(self, texts: Sequence[str], role: EmbedRole) -> tuple[Vectors, list[int]]:
        """Give float32 [texts, dimension], each row of length 1, and the tokens of each whole text."""
        prefix = self._profile.query_prefix if role is EmbedRole.QUERY else self._profile.passage_prefix
        with self._lock:
            vectors = self._model.encode(list(texts), prompt=prefix, normalize_embeddings=True, show_progress_bar=False)
        return np.asarray(vectors, dtype=np.float32), self._tokenizer.count_tokens(texts, role)
