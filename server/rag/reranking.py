"""Scores a query with passages by a cross-encoder on disk (torch), within a time limit. Knows no database and no search."""

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

import torch
from tokenizers import Encoding, Tokenizer
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from server.domain.cross_encoders import canonical_cross_encoder
from server.domain.errors import FailedPrecondition, ServiceError
from server.rag.batches import cut_batches
from server.rag.profiles import read_max_tokens
from server.rag.shelf import Shelf

# Between batches the time is looked at: about a fifth of a second of two cores' work. At least one pair, at most what a CPU's caches like.
FLOPS_PER_BATCH = 4e10
MAX_TOKENS_PER_BATCH = 2_048


class CrossEncoders:
    """Scores with cross-encoders, loaded at first use and held on a shelf. Any thread may call it."""

    def __init__(self, resolve: Callable[[str], Path], shelf: Shelf, *, device: str = "cpu") -> None:
        """`resolve` gives the checked local directory of a model (hub name, alias or path); its errors go to the caller."""
        self._resolve = resolve
        self._shelf = shelf
        self._device = torch.device(device)

    def score(self, model: str, query: str, texts: Sequence[str], deadline_seconds: float) -> Sequence[float] | None:
        """Give one score per text, higher is better, or None where `deadline_seconds` (of time.monotonic) came first.

        Raises FailedPrecondition where the model is no cross-encoder or cannot be used here, ResourceExhausted where it does not fit
        into the memory, and whatever `resolve` raises.
        """
        name = canonical_cross_encoder(model)
        if time.monotonic() >= deadline_seconds:
            return None
        loaded = self._shelf.take(CrossEncoder, name, lambda: self._resolve(name), lambda directory: _load(name, directory, self._device))
        scores = loaded.score(query, texts, lambda: time.monotonic() >= deadline_seconds)
        if scores is not None and not torch.isfinite(torch.tensor(scores)).all():
            raise refuse(name, "gives numbers that are none")
        return scores


def refuse(model: str, why: str) -> FailedPrecondition:
    """Make the error of a cross-encoder that cannot be used."""
    return FailedPrecondition(f"{model} {why}.", reason="CROSS_ENCODER_UNAVAILABLE", metadata={"cross_encoder": model})


class CrossEncoder:
    """A transformer with one label, and its tokenizer. Nothing of it changes, so any thread may use it."""

    def __init__(self, model: PreTrainedModel, tokenizer: Tokenizer, pad_id: int, *, has_types: bool, is_squashed: bool) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._pad_id = pad_id
        self._has_types = has_types
        self._is_squashed = is_squashed
        weights = max(1, sum(weight.numel() for name, weight in model.named_parameters() if "embeddings" not in name))
        self._tokens_per_batch = min(MAX_TOKENS_PER_BATCH, int(FLOPS_PER_BATCH / (2 * weights)))

    @torch.inference_mode()
    def score(self, query: str, texts: Sequence[str], is_over: Callable[[], bool]) -> Sequence[float] | None:
        """Give one score per text; None where `is_over` said so before a batch. Of a pair that is too long the longer side is cut."""
        pairs = [(_clean(query), _clean(text)) for text in texts]
        encodings = self._tokenizer.encode_batch(pairs)
        scores = [0.0] * len(texts)
        for batch in cut_batches([len(encoding.ids) for encoding in encodings], self._tokens_per_batch):
            if is_over():
                return None
            for place, score in zip(batch, self._score_batch([encodings[place] for place in batch]), strict=True):
                scores[place] = score
        return scores

    def _score_batch(self, encodings: Sequence[Encoding]) -> Sequence[float]:
        width = len(encodings[0].ids)
        device = self._model.device

        def pad(rows: Sequence[Sequence[int]], filling: int) -> torch.Tensor:
            return torch.tensor([[*row, *[filling] * (width - len(row))] for row in rows], device=device)

        types = {"token_type_ids": pad([one.type_ids for one in encodings], 0)} if self._has_types else {}
        mask = pad([[1] * len(one.ids) for one in encodings], 0)
        logits = self._model(input_ids=pad([one.ids for one in encodings], self._pad_id), attention_mask=mask, **types).logits[:, 0].float()
        return cast("list[float]", (torch.sigmoid(logits) if self._is_squashed else logits).tolist())


def _clean(text: str) -> str:
    # Half a surrogate pair is no character and no tokenizer takes it.
    return text.encode("utf-8", "replace").decode("utf-8")


def _load(name: str, directory: Path, device: torch.device) -> CrossEncoder:
    try:
        activation = _read_activation(directory)
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        model = AutoModelForSequenceClassification.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False, use_safetensors=True, dtype=torch.float32
        )
    except (ServiceError, MemoryError):
        raise
    except Exception as error:
        # Whatever a broken directory makes the libraries raise means one thing to the caller; the log has the cause.
        raise refuse(name, "cannot be loaded as a cross-encoder") from error
    if model.config.num_labels != 1:
        raise refuse(name, f"gives {model.config.num_labels} scores for a pair, not one: it is no cross-encoder that ranks")
    if activation not in ("Sigmoid", "Identity"):
        raise refuse(name, f"ends in {activation}, which is not known here")
    if not tokenizer.is_fast:
        raise refuse(name, "has no tokenizer.json")
    own = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    own.no_padding()
    own.enable_truncation(read_max_tokens(directory, {}), strategy="longest_first")
    return CrossEncoder(
        cast(PreTrainedModel, model.to(device).eval()),
        own,
        int(tokenizer.pad_token_id or 0),
        has_types="token_type_ids" in tokenizer.model_input_names,
        is_squashed=activation == "Sigmoid",
    )


def _read_activation(directory: Path) -> str:
    """Give the name of what is done to the logit, found where Sentence Transformers of each age has written it; else Sigmoid, as there."""
    configs = [
        json.loads(path.read_text("utf-8")) if path.is_file() else {}
        for path in (directory / "config_sentence_transformers.json", directory / "config.json")
    ]
    older = configs[1].get("sentence_transformers") or {}
    named = older.get("activation_fn") or configs[1].get("sbert_ce_default_activation_function") or configs[0].get("activation_fn")
    return str(named or "Sigmoid").rpartition(".")[2]
