"""An embedding model's tokenizer as passages and queries go through it: prepared, prefixed, with its special tokens. No torch."""

from collections.abc import Sequence
from itertools import takewhile

from tokenizers import Tokenizer

from server.domain.generation import EmbedRole
from server.rag.preparation import prepare_text
from server.rag.profiles import EmbeddingProfile


class EmbeddingTokenizer:
    """Counts, finds and encodes tokens. Its tokenizer is never changed after this, so any thread may use it."""

    def __init__(self, tokenizer: Tokenizer, profile: EmbeddingProfile) -> None:
        self._profile = profile
        self._whole = _copy(tokenizer)
        self._overhead_tokens = len(self._whole.encode(profile.passage_prefix).ids)
        # Special tokens behind a text: a text that is cut off still ends in them.
        self._closing_ids = _find_closing(self._whole)

    @property
    def max_tokens(self) -> int:
        """The tokens that the model reads, special ones and prefix among them."""
        return self._profile.max_tokens

    @property
    def overhead_tokens(self) -> int:
        """The tokens that special ones and the passage prefix take."""
        return self._overhead_tokens

    def count_tokens(self, texts: Sequence[str], role: EmbedRole = EmbedRole.PASSAGE) -> list[int]:
        """Count each text's tokens, overhead included, nothing cut off."""
        prepared = self._prepare(texts, role)
        return [len(encoding.ids) for encoding in self._whole.encode_batch_fast(prepared)]

    def find_tokens(self, texts: Sequence[str]) -> list[list[int]]:
        """Give the places in each text, in characters and rising, where its tokens begin; no special tokens."""
        prepared = [prepare_text(text, self._profile.preparation) for text in texts]
        encodings = self._whole.encode_batch([one.text for one in prepared], add_special_tokens=False)
        return [
            [one.find_origin(start) for start, end in encoding.offsets if end > start]
            for one, encoding in zip(prepared, encodings, strict=True)
        ]

    def encode(self, texts: Sequence[str], role: EmbedRole) -> tuple[list[list[int]], list[int]]:
        """Give each text's token ids, cut off where the model stops reading, and how many tokens the whole text has."""
        whole = [encoding.ids for encoding in self._whole.encode_batch_fast(self._prepare(texts, role))]
        kept_tokens = self.max_tokens - len(self._closing_ids)
        ids = [each if len(each) <= self.max_tokens else each[:kept_tokens] + self._closing_ids for each in whole]
        return ids, [len(each) for each in whole]

    def _prepare(self, texts: Sequence[str], role: EmbedRole) -> list[str]:
        prefix = self._profile.query_prefix if role is EmbedRole.QUERY else self._profile.passage_prefix
        return [prefix + prepare_text(text, self._profile.preparation).text for text in texts]


def _find_closing(tokenizer: Tokenizer) -> list[int]:
    empty, some = tokenizer.encode(""), tokenizer.encode("a")
    closing = len(list(takewhile(bool, reversed(some.special_tokens_mask))))
    return empty.ids[len(empty.ids) - closing :] if closing else []


def _copy(tokenizer: Tokenizer) -> Tokenizer:
    copy = Tokenizer.from_str(tokenizer.to_str())
    copy.no_padding()
    copy.no_truncation()
    return copy
