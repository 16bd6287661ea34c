"""The cross-encoders that are known by alias, with their licences: models that score a query and a passage together. Facts only."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CrossEncoderModel:
    """A model that gives one score for a query with a passage. `max_tokens` is of both together."""

    cross_encoder_id: str
    aliases: tuple[str, ...]
    family: str
    max_tokens: int
    license: str
    languages: tuple[str, ...]


def _ms_marco(size: str) -> CrossEncoderModel:
    return CrossEncoderModel(
        f"cross-encoder/ms-marco-MiniLM-{size}-v2", (f"ms-marco-minilm-{size.lower()}",), "ms-marco", 512, "Apache-2.0", ("en",)
    )


CROSS_ENCODERS: Sequence[CrossEncoderModel] = (
    CrossEncoderModel("BAAI/bge-reranker-v2-m3", ("bge-reranker-v2-m3",), "bge", 8_192, "Apache-2.0", ("ar", "en", "mul")),
    CrossEncoderModel("BAAI/bge-reranker-base", ("bge-reranker-base",), "bge", 512, "MIT", ("en", "zh")),
    CrossEncoderModel("BAAI/bge-reranker-large", ("bge-reranker-large",), "bge", 512, "MIT", ("en", "zh")),
    _ms_marco("L4"),
    _ms_marco("L6"),
    _ms_marco("L12"),
    CrossEncoderModel(
        "cross-encoder/mmarco-mMiniLMv2-L12-H384-v1", ("mmarco-minilm-l12",), "mmarco", 512, "Apache-2.0", ("ar", "en", "mul")
    ),
)

_BY_NAME = {name.casefold(): model for model in CROSS_ENCODERS for name in (model.cross_encoder_id, *model.aliases)}


def canonical_cross_encoder(name: str) -> str:
    """Give the hub name that an alias stands for; other names stay."""
    known = _BY_NAME.get(name.casefold())
    return known.cross_encoder_id if known else name
