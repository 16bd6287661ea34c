"""The embedding models that this service promises, with what each one needs to be used well; and how any promised model is found.

Facts only: whether one can be loaded here is known elsewhere. Licences are those of the hub's model cards.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from server.domain.base_models import BASE_MODELS, BaseModel


class Pooling(StrEnum):
    """How one vector is made of the token vectors: the first one, or the mean over all that are not padding."""

    CLS = "CLS"
    MEAN = "MEAN"


class Preparation(StrEnum):
    """What is done to a text before its tokens are taken."""

    NONE = "NONE"
    ARABERT_V02 = "ARABERT_V02"
    UNDIACRITIZED = "UNDIACRITIZED"
    FARASA = "FARASA"


PREPARATION_SENTENCES = {
    Preparation.NONE: "",
    Preparation.ARABERT_V02: (
        "HTML entities resolved, diacritics and tatweel removed, Arabic-Indic digits to ASCII, "
        "spaces around punctuation and between digits and letters."
    ),
    Preparation.UNDIACRITIZED: "Diacritics and tatweel removed.",
    Preparation.FARASA: "Segmented into morphemes by Farasa.",
}


@dataclass(frozen=True, slots=True)
class EmbeddingModel:
    """A model that turns text into unit vectors. `max_tokens` counts special tokens and the prefix too."""

    embedding_model_id: str
    aliases: tuple[str, ...]
    display_name: str
    family: str
    dimension: int
    max_tokens: int
    pooling: Pooling
    license: str
    languages: tuple[str, ...]
    tuned_for_retrieval: bool
    query_prefix: str = ""
    passage_prefix: str = ""
    preparation: Preparation = Preparation.NONE
    note: str = ""

    @property
    def text_preparation(self) -> str:
        """What is done to a text before it is embedded, as a sentence; empty for nothing."""
        return PREPARATION_SENTENCES[self.preparation]

    @property
    def refusal(self) -> str:
        """Why this service cannot use the model, as a sentence; empty where it can."""
        return FARASA_REFUSAL if self.preparation is Preparation.FARASA else ""


FARASA_REFUSAL = (
    "This model reads text that Farasa (Java, under a research licence) has cut into morphemes, which this service does not do: "
    "choose aubmindlab/bert-base-arabertv02, which needs no segmentation."
)
NOT_TUNED_NOTE = "Never trained to retrieve: similarities bunch high and a threshold means little. Prefer BAAI/bge-m3, or search hybrid."

_MANY_LANGUAGES = ("ar", "en", "mul")


def _sentence_transformer(name: str, shown: str, dimension: int, max_tokens: int, languages: tuple[str, ...], note: str) -> EmbeddingModel:
    return EmbeddingModel(
        f"sentence-transformers/{name}", (name.lower(),), shown, "sentence-transformers", dimension, max_tokens, Pooling.MEAN, "Apache-2.0",
        languages, True, note=note,
    )  # fmt: skip


# From the model card of BAAI/bge-*-en-v1.5; passages get nothing.
BGE_QUERY_INSTRUCTION = "Represent this sentence for searching relevant passages: "


def _bge_english(size: str, dimension: int) -> EmbeddingModel:
    return EmbeddingModel(
        f"BAAI/bge-{size}-en-v1.5", (f"bge-{size}-en-v1.5", f"bge-{size}-en"), f"BGE {size} English v1.5", "bge", dimension, 512,
        Pooling.CLS, "MIT", ("en",), True, query_prefix=BGE_QUERY_INSTRUCTION, note="English only.",
    )  # fmt: skip


def _e5(size: str, dimension: int) -> EmbeddingModel:
    return EmbeddingModel(
        f"intfloat/multilingual-e5-{size}", (f"multilingual-e5-{size}",), f"Multilingual E5 {size}", "e5", dimension, 512, Pooling.MEAN,
        "MIT", _MANY_LANGUAGES, True, query_prefix="query: ", passage_prefix="passage: ", note="About 100 languages, Arabic among them.",
    )  # fmt: skip


def _arabert(name: str, shown: str, dimension: int, preparation: Preparation) -> EmbeddingModel:
    note = FARASA_REFUSAL if preparation is Preparation.FARASA else NOT_TUNED_NOTE
    return EmbeddingModel(
        f"aubmindlab/{name}", (name,), shown, "arabert", dimension, 512, Pooling.MEAN, "AUB AraBERT licence", ("ar",), False,
        preparation=preparation, note=note,
    )  # fmt: skip


def _camelbert(variant: str, shown: str) -> EmbeddingModel:
    name = f"bert-base-arabic-camelbert-{variant}"
    return EmbeddingModel(
        f"CAMeL-Lab/{name}", (name, f"camelbert-{variant}"), f"CAMeLBERT {shown}", "camelbert", 768, 512, Pooling.MEAN, "Apache-2.0",
        ("ar",), False, preparation=Preparation.UNDIACRITIZED, note=NOT_TUNED_NOTE,
    )  # fmt: skip


EMBEDDING_MODELS: Sequence[EmbeddingModel] = (
    _sentence_transformer("all-MiniLM-L6-v2", "all-MiniLM-L6-v2", 384, 256, ("en",), "Installed with the service. English only."),
    EmbeddingModel(
        "BAAI/bge-m3", ("bge-m3",), "BGE-M3", "bge", 1_024, 8_192, Pooling.CLS, "MIT", _MANY_LANGUAGES, True,
        note="Over 100 languages; the first choice for Arabic. Where the hub offers it as pickled weights only, save them as safetensors "
        "first and give the directory.",
    ),
    _bge_english("small", 384),
    _bge_english("base", 768),
    _bge_english("large", 1_024),
    _sentence_transformer(
        "paraphrase-multilingual-MiniLM-L12-v2", "Multilingual paraphrase MiniLM", 384, 128, _MANY_LANGUAGES,
        "About 50 languages; reads only 128 tokens, so chunks are short.",
    ),
    _sentence_transformer(
        "paraphrase-multilingual-mpnet-base-v2", "Multilingual paraphrase MPNet", 768, 128, _MANY_LANGUAGES,
        "About 50 languages; reads only 128 tokens, so chunks are short.",
    ),
    _e5("small", 384),
    _e5("base", 768),
    _e5("large", 1_024),
    _arabert("bert-base-arabertv02", "AraBERT v0.2 base", 768, Preparation.ARABERT_V02),
    _arabert("bert-large-arabertv02", "AraBERT v0.2 large", 1_024, Preparation.ARABERT_V02),
    _arabert("bert-base-arabertv2", "AraBERT v2 base", 768, Preparation.FARASA),
    _arabert("bert-base-arabert", "AraBERT v1 base", 768, Preparation.FARASA),
    _camelbert("msa", "Modern Standard Arabic"),
    _camelbert("mix", "mixed"),
    _camelbert("ca", "Classical Arabic"),
    _camelbert("da", "dialectal Arabic"),
)  # fmt: skip

_BASE_MODELS_BY_NAME = {name.casefold(): model for model in BASE_MODELS for name in (model.base_model_id, *model.aliases)}
_EMBEDDING_MODELS_BY_NAME = {name.casefold(): model for model in EMBEDDING_MODELS for name in (model.embedding_model_id, *model.aliases)}


def find_base_model(name: str) -> BaseModel | None:
    """Find a base model by hub name or alias, in any case of letters; None for what the catalogue does not list."""
    return _BASE_MODELS_BY_NAME.get(name.casefold())


def find_embedding_model(name: str) -> EmbeddingModel | None:
    """Find an embedding model by hub name or alias, in any case of letters; None for what the catalogue does not list."""
    return _EMBEDDING_MODELS_BY_NAME.get(name.casefold())
