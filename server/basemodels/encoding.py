"""Texts with marked turns to token ids, so that what stands before an answer has the same ids whether or not the answer follows.

Knows nothing of templates. Many texts at once go through the fast tokenizer's own threads.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from transformers import PreTrainedTokenizerBase

from server.basemodels.errors import RenderingRefused


@dataclass(frozen=True, slots=True)
class TrainedSpan:
    """An answer's tokens, [start, end): its content and, last, its end token. `weight` 0: it is read, not learnt."""

    start: int
    end: int
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation as token ids; `spans` says which of them are trained. `had_double_bos`: a second BOS was taken out."""

    token_ids: list[int]
    spans: tuple[TrainedSpan, ...] = ()
    had_double_bos: bool = False

    @property
    def trained_mask(self) -> tuple[bool, ...]:
        """One flag per token: whether the loss counts its prediction."""
        return tuple(weight > 0 for weight in self.weights)

    @property
    def weights(self) -> list[float]:
        """One number per token: how much the loss counts its prediction."""
        weights = [0.0] * len(self.token_ids)
        for span in self.spans:
            weights[span.start : span.end] = [span.weight] * (span.end - span.start)
        return weights


@dataclass(frozen=True, slots=True)
class MarkedTurn:
    """Where an answer stands in a text, in characters."""

    start: int
    end: int
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class MarkedText:
    """A text and the answers in it. `notes` are codes of what its making has shown."""

    text: str
    turns: tuple[MarkedTurn, ...] = ()
    notes: tuple[str, ...] = field(default=())


class FastEncoding(Protocol):
    """What is used of a tokenizers.Encoding."""

    @property
    def ids(self) -> list[int]:
        """The token ids."""

    @property
    def offsets(self) -> list[tuple[int, int]]:
        """Where each token stands in the text, in characters."""


class Encoder:
    """Encodes marked texts with one tokenizer. Not for tokenizers whose special tokens change meanwhile."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        added = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.special_ids = frozenset(added | {int(token_id) for token_id in tokenizer.all_special_ids})
        # Tokens that split the text before all else: what follows them cannot change what stands before.
        unknown = tokenizer.unk_token_id
        self._splitting_ids = frozenset(token_id for token_id in added if token_id != unknown)
        self._tails: dict[tuple[int, str], list[int] | None] = {}

    def encode(self, marked: MarkedText) -> Rendered:
        """Encode one text. Raises RenderingRefused where an answer has no end token."""
        result = self.encode_all([marked])[0]
        if isinstance(result, RenderingRefused):
            raise result
        return result

    def encode_all(self, texts: Sequence[MarkedText]) -> list[Rendered | RenderingRefused]:
        """Encode texts, each to its tokens or to the reason why it has none."""
        if not self._tokenizer.is_fast:
            return [self._finish(marked, self._encode_by_parts(marked)) for marked in texts]
        batch = self._tokenizer.backend_tokenizer.encode_batch([marked.text for marked in texts], add_special_tokens=False)
        return [self._finish(marked, self._find_spans(marked, encoding)) for marked, encoding in zip(texts, batch, strict=True)]

    def plain_ids(self, text: str) -> list[int]:
        """Encode a text without any marks and without adding special tokens."""
        return list(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _find_spans(self, marked: MarkedText, encoding: FastEncoding) -> tuple[list[int], list[TrainedSpan]]:
        """Find the answers in the whole text's tokens; only where a border is not faithful, encode by parts."""
        ids, offsets = encoding.ids, encoding.offsets
        ends = [end for _, end in offsets]
        spans = []
        for turn in marked.turns:
            start = self._find_border(marked.text, turn.start, ids, offsets, ends)
            end = self._find_border(marked.text, turn.end, ids, offsets, ends)
            if start is None or end is None:
                return self._encode_by_parts(marked)
            spans.append(TrainedSpan(start, end, turn.weight))
        return ids, spans

    def _find_border(
        self, text: str, border: int, ids: Sequence[int], offsets: Sequence[tuple[int, int]], ends: Sequence[int]
    ) -> int | None:
        """Give the number of tokens before a border where the text up to it, alone, has just these tokens; None: not known to."""
        if border >= len(text):
            return len(ids)
        # Ends never fall, but of tokens that share a character of several bytes all end together.
        place = bisect_left(ends, border + 1)
        if place >= len(ids) or offsets[place][0] < border:
            return None  # a token straddles the border
        last = place - 1
        while last >= 0 and ids[last] not in self._splitting_ids:
            last -= 1
        if last < 0:
            return None
        tail = text[offsets[last][1] : border]
        return place if self._encode_tail(ids[last], tail) == list(ids[last + 1 : place]) else None

    def _encode_tail(self, special_id: int, tail: str) -> list[int] | None:
        """Give the tokens of a text that ends a prompt behind a special token. Few of them exist: a template's own words."""
        if not tail:
            return []
        key = (special_id, tail)
        if key not in self._tails:
            ids = self.plain_ids(str(self._tokenizer.convert_ids_to_tokens(special_id)) + tail)
            known = ids[1:] if ids[:1] == [special_id] else None
            if len(tail) > MAX_KEPT_TAIL_CHARACTERS or len(self._tails) >= MAX_KEPT_TAILS:
                return known
            self._tails[key] = known
        return self._tails[key]

    def _encode_by_parts(self, marked: MarkedText) -> tuple[list[int], list[TrainedSpan]]:
        """Encode the whole text; where a token would straddle a border, or the text before it has other tokens alone, cut there."""
        ids: list[int] = []
        cut = 0
        rest = self.plain_ids(marked.text)
        spans: list[TrainedSpan] = []
        for turn in marked.turns:
            places = []
            for border in (turn.start, turn.end):
                head = self.plain_ids(marked.text[cut:border])
                if rest[: len(head)] != head:
                    ids += head
                    cut, head, rest = border, [], self.plain_ids(marked.text[border:])
                places.append(len(ids) + len(head))
            spans.append(TrainedSpan(places[0], places[1], turn.weight))
        return ids + rest, spans

    def _finish(self, marked: MarkedText, found: tuple[list[int], list[TrainedSpan]]) -> Rendered | RenderingRefused:
        ids, spans = found
        closed = [TrainedSpan(span.start, self._end_of_content(ids, span), span.weight) for span in spans]
        if any(span.end == 0 for span in closed):
            return RenderingRefused("An assistant turn has no end token after rendering.", reason="END_TOKEN_NOT_TRAINED")
        bos = self._tokenizer.bos_token_id
        if bos is None or ids[:2] != [bos, bos]:
            return Rendered(ids, tuple(closed))
        moved = tuple(TrainedSpan(max(0, span.start - 1), span.end - 1, span.weight) for span in closed)
        return Rendered(ids[1:], moved, had_double_bos=True)

    def _end_of_content(self, ids: Sequence[int], span: TrainedSpan) -> int:
        """Move a span's end behind its last special token (0: it has none): the line break that a template writes is not learnt."""
        return next((place + 1 for place in range(span.end - 1, span.start - 1, -1) if ids[place] in self.special_ids), 0)


MAX_KEPT_TAIL_CHARACTERS = 200
MAX_KEPT_TAILS = 1000
