"""An embedding model's tokenizer as passages and queries go through it: prepared, prefixed, with its special tokens. No torch."""

from collections.abc import Sequence

from tokenizers import Tokenizer

from server.domain.generation import EmbedRole
from server.rag.preparation import prepare_text
from server.rag.profiles import EmbeddingProfile


class EmbeddingTokenizer:
    """Counts, finds and encodes tokens. Its two tokenizers are never changed after this, so any thread may use it."""

    def __init__(self, tokenizer: Tokenizer, profile: EmbeddingProfile) -> None:
        self._profile = profile
        self._whole = _copy(tokenizer)
        self._bounded = _copy(tokenizer)
        self._bounded.enable_truncation(profile.max_tokens)
        self._overhead_tokens = len(self._whole.encode(profile.passage_prefix).ids)

    @property
    def max_tokens(self) -> int:
        """The tokens that the model reads, special ones and prefix among them."""
        return self._profile.max_tokens

    @property
    def overhead_tokens(self) -> int:
        """The tokens that special ones and the passage prefix take."""
        return self._overhead_tokens

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Count each passage's tokens, overhead included, nothing cut off."""
        prepared = self._prepare(texts, EmbedRole.PASSAGE)
        return [len(encoding.ids) for encoding in self._whole.encode_batch_fast(prepared)]

    def find_tokens(self, texts: Sequence[str]) -> list[list[int]]:
        """Give the places in each text, in characters and rising, where its tokens begin; no special tokens."""
        prepared = [prepare_text(text, self._profile.preparation) for text in texts]
        encodings = self._whole.encode_batch([one.text for one in prepared], add_special_tokens=False)
        return [
            [one.find_origin(start) for start, end in encoding.offsets if end > start]
            for one, encoding in zip(prepared, encodings, strict=True)
        ]

    def encode(self, texts: Sequence[str], role: EmbedRole) -> list[list[int]]:
        """Give each text's token ids, cut off where the model stops reading."""
        return [encoding.ids for encoding in self._bounded.encode_batch_fast(self._prepare(texts, role))]

    def _prepare(self, texts: Sequence[str], role: EmbedRole) -> list[str]:
        prefix = self._profile.query_prefix if role is EmbedRole.QUERY else self._profile.passage_prefix
        return [prefix + prepare_text(text, self._profile.preparation).text for text in texts]


def _copy(tokenizer: Tokenizer) -> Tokenizer:
    copy = Tokenizer.from_str(tokenizer.to_str())
    copy.no_padding()
    copy.no_truncation()
    return copy
