"""Cuts a document into chunks that the embedding model can read whole, at sentence ends where it can.

Counts tokens by the embedding model's own tokenizer, which is passed in. Every chunk is a piece of the original text, with its place.
"""

import re
import unicodedata
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from server.domain.retrieval import Chunking
from server.services.sentences import split_sentences

# Tokens of a chunk where the caller leaves it to us and the model reads more: small enough to cite, large enough to mean something.
DEFAULT_CHUNK_TOKENS = 256
# A word longer than this is cut: long ones are no words (base64, missing spaces) or belong to a script without spaces.
MAX_WORD_CHARACTERS = 32
# A token stands for some four characters. One that stands for very many (an unknown word, a run of blanks) must not make a chunk huge.
MAX_CHARACTERS_PER_TOKEN = 16
# Tokenizers are asked about pieces of this size, so that their time and memory stay proportional to the text.
MAX_PIECE_CHARACTERS = 2_000
PIECES_PER_BATCH = 256
# A heading begins a new chunk where the one before it has this part of its tokens; shorter sections stay together.
LEAST_SECTION = 0.25

_WORD = re.compile(r"\S+")
# A joined character must not lose its second half to another chunk: joiners and variation selectors belong to what is before.
_JOINERS = frozenset("\u200c\u200d\ufe0e\ufe0f\u0640")


class PassageTokenizer(Protocol):
    """The embedding model's tokenizer, as it will read passages: with their prefix, their preparation and its special tokens."""

    @property
    def max_tokens(self) -> int:
        """The tokens that the model reads, special ones and prefix among them."""

    @property
    def overhead_tokens(self) -> int:
        """The tokens that special ones and the prefix take."""

    def count_tokens(self, texts: Sequence[str]) -> Sequence[int]:
        """Count each passage's tokens, overhead included, nothing cut off."""

    def find_tokens(self, texts: Sequence[str]) -> Sequence[Sequence[int]]:
        """Give the places in each text, in characters and rising, where its tokens begin; no special tokens."""


@dataclass(frozen=True, slots=True)
class TextChunk:
    """A piece of a document: `text[char_start:char_end]` of the original, in code points. `token_count` is without overhead."""

    char_start: int
    char_end: int
    token_count: int


@dataclass(frozen=True, slots=True)
class _Words:
    """A text as words (long ones in pieces): where each begins and ends, the tokens before it, the words that begin sentences, headings."""

    starts: Sequence[int]
    ends: Sequence[int]
    tokens_before: Sequence[int]
    sentence_starts: Sequence[int]
    heading_starts: Sequence[int]

    def __len__(self) -> int:
        return len(self.starts)

    def is_heading(self, word: int) -> bool:
        """Say whether a heading begins with a word."""
        place = bisect_left(self.heading_starts, word)
        return place < len(self.heading_starts) and self.heading_starts[place] == word

    def count(self, first: int, end: int) -> int:
        """Count the tokens of the words `first` up to, not including, `end`."""
        return self.tokens_before[end] - self.tokens_before[first]


def resolve_chunk_tokens(chunking: Chunking, tokenizer: PassageTokenizer) -> tuple[int, int]:
    """Give the tokens that a chunk may have, and those that it shares with the one before; never more than the model reads."""
    readable = max(1, tokenizer.max_tokens - tokenizer.overhead_tokens)
    budget = min(chunking.max_tokens or DEFAULT_CHUNK_TOKENS, readable)
    return budget, max(0, min(chunking.overlap_tokens, budget // 2))


def cut_text(text: str, chunking: Chunking, tokenizer: PassageTokenizer, headings: Sequence[int] = ()) -> list[TextChunk]:
    """Cut a text. Every character but white space is in some chunk; none is longer than the model reads. Takes linear time.

    `headings` are the places where headings begin, rising: chunks end before them, so that most have one heading path.
    """
    budget, overlap = resolve_chunk_tokens(chunking, tokenizer)
    words = _find_words(text, tokenizer, headings)
    spans = list(_pack(words, budget, overlap))
    return list(_drop_contained(_fit(text, words, spans, budget, tokenizer)))


def _find_words(text: str, tokenizer: PassageTokenizer, headings: Sequence[int]) -> _Words:
    starts: list[int] = []
    ends: list[int] = []
    sentence_starts: list[int] = []
    for first, last in split_sentences(text):
        sentence_starts.append(len(starts))
        for match in _WORD.finditer(text, first, last):
            for start, end in _cut_word(text, match.start(), match.end()):
                starts.append(start)
                ends.append(end)
    tokens = _find_token_places(text, starts, ends, tokenizer)
    # A token may begin at the space before its word: it counts for the word that ends behind it.
    tokens_before = [0, *(bisect_left(tokens, end) for end in ends)]
    return _Words(starts, ends, tokens_before, sentence_starts, [bisect_left(starts, heading) for heading in headings])


def _cut_word(text: str, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Cut a long word into pieces, not between a letter and its marks unless there is no end of them."""
    while end - start > MAX_WORD_CHARACTERS:
        cut = start + MAX_WORD_CHARACTERS
        while cut > start + 1 and (text[cut] in _JOINERS or text[cut - 1] in _JOINERS or unicodedata.combining(text[cut])):
            cut -= 1
        cut = cut if cut > start + 1 else start + MAX_WORD_CHARACTERS
        yield start, cut
        start = cut
    yield start, end


def _find_token_places(text: str, starts: Sequence[int], ends: Sequence[int], tokenizer: PassageTokenizer) -> list[int]:
    """Give the places where tokens begin, asking the tokenizer about runs of whole words."""
    pieces: list[tuple[int, int]] = []
    for start, end in zip(starts, ends, strict=True):
        if pieces and end - pieces[-1][0] <= MAX_PIECE_CHARACTERS:
            pieces[-1] = (pieces[-1][0], end)
        else:
            pieces.append((start, end))
    places: list[int] = []
    for first in range(0, len(pieces), PIECES_PER_BATCH):
        batch = pieces[first : first + PIECES_PER_BATCH]
        found = tokenizer.find_tokens([text[start:end] for start, end in batch])
        for (start, _), tokens in zip(batch, found, strict=True):
            places.extend(start + token for token in tokens)
    return places


def _pack(words: _Words, budget: int, overlap: int) -> Iterator[tuple[int, int]]:
    """Give runs of words [first, end): as many sentences as fit; one that alone is too long is filled up and cut between words."""
    first = previous_end = 0
    while previous_end < len(words):
        limit = _furthest(words, first, budget)
        end = limit if limit == len(words) else _last_sentence_end(words, previous_end, limit, budget)
        end = _end_before_heading(words, first, previous_end, end, budget)
        yield first, end
        previous_end = end
        if words.is_heading(end):
            first = end
        elif end < len(words):
            first = _overlap_start(words, first, end, budget, overlap)


def _end_before_heading(words: _Words, first: int, least: int, end: int, budget: int) -> int:
    """Give where a run that may go to `end` does end: behind `least`, before a heading if that leaves enough, never right behind one."""
    enough = bisect_left(words.tokens_before, words.tokens_before[first] + LEAST_SECTION * budget)
    place = bisect_left(words.heading_starts, max(enough, least + 1))
    if place < len(words.heading_starts):
        end = min(end, words.heading_starts[place])
    place = bisect_left(words.heading_starts, end) - 1
    while end < len(words) and place >= 0 and words.heading_starts[place] > max(first, least):
        heading = words.heading_starts[place]
        if bisect_left(words.sentence_starts, end) > bisect_right(words.sentence_starts, heading):
            break
        end = heading
        place -= 1
    return end


def _furthest(words: _Words, first: int, budget: int) -> int:
    """Give the end of the longest run from `first` within budget, in tokens and in characters; at least one word."""
    by_tokens = bisect_right(words.tokens_before, words.tokens_before[first] + budget) - 1
    by_characters = bisect_right(words.ends, words.starts[first] + budget * MAX_CHARACTERS_PER_TOKEN)
    return max(first + 1, min(by_tokens, by_characters, len(words)))


def _last_sentence_end(words: _Words, least: int, limit: int, budget: int) -> int:
    """Give the last end of a sentence behind `least` and not behind `limit`; `limit` where the next sentence must be cut anyway."""
    place = bisect_right(words.sentence_starts, limit) - 1
    end = words.sentence_starts[place]
    if end == limit:
        return limit
    next_end = words.sentence_starts[place + 1] if place + 1 < len(words.sentence_starts) else len(words)
    fits_alone = end > least and next_end <= _furthest(words, end, budget)
    return end if fits_alone else limit


def _overlap_start(words: _Words, first: int, end: int, budget: int, overlap: int) -> int:
    """Give the word that the next run begins with: whole sentences of the last one where they fit into the overlap, else words.

    Leaves room for the whole sentence that comes next, where that fits a chunk at all.
    """
    place = bisect_right(words.sentence_starts, end)
    next_end = words.sentence_starts[place] if place < len(words.sentence_starts) else len(words)
    needed = words.count(end, next_end)
    room = min(overlap, budget - needed if needed <= budget else budget)
    by_tokens = bisect_left(words.tokens_before, words.tokens_before[end] - room, first + 1, end)
    start = bisect_left(words.starts, words.ends[end - 1] - room * MAX_CHARACTERS_PER_TOKEN, by_tokens, end)
    sentence = bisect_left(words.sentence_starts, start)
    if sentence < len(words.sentence_starts) and words.sentence_starts[sentence] < end:
        start = words.sentence_starts[sentence]
    # Some character limit, too, must leave room for something new.
    return start if _furthest(words, start, budget) > end else end


def _fit(text: str, words: _Words, spans: Sequence[tuple[int, int]], budget: int, tokenizer: PassageTokenizer) -> Iterator[TextChunk]:
    """Count each chunk as the model will read it. The few that are too long (alone, a piece can have more tokens) are halved."""
    for first_span in range(0, len(spans), PIECES_PER_BATCH):
        pending = [(words.starts[first], words.ends[end - 1]) for first, end in spans[first_span : first_span + PIECES_PER_BATCH]]
        done: list[TextChunk] = []
        while pending:
            counts = tokenizer.count_tokens([text[start:end] for start, end in pending])
            halves: list[tuple[int, int]] = []
            for (start, end), count in zip(pending, counts, strict=True):
                tokens = max(0, count - tokenizer.overhead_tokens)
                if tokens > budget and end - start > 1:
                    halves += _halve(words, start, end)
                else:
                    done.append(TextChunk(start, end, tokens))
            pending = halves
        yield from sorted(done, key=lambda chunk: (chunk.char_start, chunk.char_end))


def _halve(words: _Words, start: int, end: int) -> list[tuple[int, int]]:
    """Halve a span at the word nearest behind its middle, or inside its one word."""
    middle = (start + end) // 2
    word = bisect_left(words.starts, middle)
    if word < len(words) and words.starts[word] < end:
        return [(start, words.ends[word - 1]), (words.starts[word], end)]
    if word > 0 and words.starts[word - 1] > start:
        return [(start, words.ends[word - 2]), (words.starts[word - 1], end)]
    return [(start, middle), (middle, end)]


def _drop_contained(chunks: Iterator[TextChunk]) -> Iterator[TextChunk]:
    """Leave out what another chunk holds whole: overlaps, once halved, may."""
    last: TextChunk | None = None
    for chunk in chunks:
        if last is not None and chunk.char_end <= last.char_end:
            continue
        if last is not None and chunk.char_start > last.char_start:
            yield last
        last = chunk
    if last is not None:
        yield last
