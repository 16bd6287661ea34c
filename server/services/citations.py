"""Which passages an answer rests on: every citation given here quotes what stands in the document, and supports what was said.

Works on words alone, so that it costs milliseconds and cannot make a quote up.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from server.domain.retrieval import Citation, RetrievedChunk
from server.services.sentences import fold_content_words, fold_words, split_sentences

# [1], [1, 3], [Source 2], 【2】, [المصدر ٢]; ranges are not read.
_MARKER = re.compile(r"[\[【]\s*(?:(?:source|sources|المصدر|المصادر)\s*)?(\d{1,4}(?:\s*[,،;؛]\s*\d{1,4})*)\s*[\]】]", re.IGNORECASE)
_NUMBER = re.compile(r"\d+")
_LIST_NUMBER = re.compile(r"^\s*\d{1,3}[.)]\s")

# The part of a sentence's content words that a passage must hold. A sentence that names its source is believed sooner.
LEAST_SUPPORT = 0.6
LEAST_SUPPORT_WITH_MARKER = 0.3
# Without a marker one common word proves nothing.
LEAST_WORDS = 2
# A quote grows by a neighbouring sentence only for this many more words.
WORDS_WORTH_A_SENTENCE = 2
MAX_QUOTE_SENTENCES = 3


@dataclass(frozen=True, slots=True)
class CheckedCitations:
    """The citations that hold, in the order of the answer, and how many of the answer's own markers did not."""

    citations: tuple[Citation, ...]
    dropped_count: int


@dataclass(frozen=True, slots=True)
class _Claim:
    """A sentence of the answer, without its markers, and the sources that it names."""

    text: str
    sources: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Passage:
    """A sentence of a chunk: its place in the chunk's text, and its words."""

    start: int
    end: int
    words: frozenset[str]


@dataclass(frozen=True, slots=True)
class _Source:
    """A numbered source, cut into sentences."""

    number: int
    found: RetrievedChunk
    passages: tuple[_Passage, ...]


@dataclass(frozen=True, slots=True)
class _Quote:
    """The sentences `first` to `last` of a source, and how many of the claim's words they hold."""

    source: _Source
    first: int
    last: int
    matched: frozenset[str]

    @property
    def rank(self) -> tuple[int, int]:
        """More of the claim's words first, then the shorter quote."""
        return len(self.matched), self.source.passages[self.first].start - self.source.passages[self.last].end


def cite_answer(answer: str, sources: Sequence[RetrievedChunk]) -> CheckedCitations:
    """Check an answer against its sources, numbered from 1 as they were given to the model.

    A marker that names no source, or one that does not support its sentence, is dropped and counted. Sentences without a
    marker are cited where a source clearly holds them. Offsets are those of the document's original text.
    """
    cut = [_cut(number, found) for number, found in enumerate(sources, start=1)]
    citations: dict[tuple[str, int, int], Citation] = {}
    dropped_count = 0
    for claim in _read_claims(answer):
        words = fold_content_words(claim.text)
        for number in claim.sources:
            quote = _find_quote(words, cut[number - 1], LEAST_SUPPORT_WITH_MARKER, 1) if 1 <= number <= len(cut) else None
            if quote is None:
                dropped_count += 1
            else:
                _add(citations, quote)
        if not claim.sources and (quote := _attribute(claim.text, words, cut)) is not None:
            _add(citations, quote)
    return CheckedCitations(tuple(citations.values()), dropped_count)


def _read_claims(answer: str) -> list[_Claim]:
    """Cut the answer into sentences with the sources that each one names."""
    claims: list[_Claim] = []
    last_end = 0
    for start, end in split_sentences(answer):
        # Markers behind a full stop belong to the sentence before, unless they begin a line.
        behind = bool(claims) and "\n" not in answer[last_end:start]
        text_start = _skip_markers(answer, start, end) if behind else start
        _name_sources(claims, answer[start:text_start])
        sentence = answer[text_start:end]
        text = _LIST_NUMBER.sub("", _MARKER.sub(" ", sentence))
        if fold_words(text):
            claims.append(_Claim(text, _read_markers(sentence)))
        else:
            _name_sources(claims, sentence)
        last_end = end
    return claims


def _skip_markers(text: str, start: int, end: int) -> int:
    """Give the place behind the markers that stand at `start`, at most `end`."""
    while match := _MARKER.match(text, start, end):
        start = match.end()
        while start < end and text[start].isspace():
            start += 1
    return start


def _name_sources(claims: list[_Claim], markers: str) -> None:
    """Give markers to the last claim; without one they name sources of nothing, and will be dropped."""
    if named := _read_markers(markers):
        last = claims.pop() if claims else _Claim("", ())
        claims.append(_Claim(last.text, _distinct(last.sources + named)))


def _read_markers(text: str) -> tuple[int, ...]:
    return _distinct(tuple(int(number) for match in _MARKER.finditer(text) for number in _NUMBER.findall(match[1])))


def _distinct(numbers: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(dict.fromkeys(numbers))


def _cut(number: int, found: RetrievedChunk) -> _Source:
    text = found.chunk.text
    passages = (_Passage(start, end, fold_content_words(text[start:end])) for start, end in split_sentences(text))
    return _Source(number, found, tuple(passages))


def _attribute(claim: str, words: frozenset[str], sources: Sequence[_Source]) -> _Quote | None:
    """Find the source that best supports a sentence without a marker; a short answer must stand there word by word."""
    least_words = LEAST_WORDS
    if len(words) < LEAST_WORDS:
        phrase = f" {' '.join(fold_words(claim))} "
        sources = [source for source in sources if phrase in f" {' '.join(fold_words(source.found.chunk.text))} "]
        least_words = 1
    quotes = [quote for source in sources if (quote := _find_quote(words, source, LEAST_SUPPORT, least_words)) is not None]
    return max(quotes, key=lambda quote: quote.rank, default=None)


def _find_quote(words: frozenset[str], source: _Source, least_support: float, least_words: int) -> _Quote | None:
    """Find the sentences of one source that support a claim's words best; None where they do not, or lack one of its numbers."""
    if not words or not source.passages:
        return None
    singles = [_Quote(source, place, place, words & passage.words) for place, passage in enumerate(source.passages)]
    quote = _grow(words, max(singles, key=lambda single: single.rank))
    numbers = {word for word in words if word[0].isdigit()}
    supported = len(quote.matched) >= max(least_words, least_support * len(words)) and numbers <= quote.matched
    return quote if supported else None


def _grow(words: frozenset[str], quote: _Quote) -> _Quote:
    """Take in neighbouring sentences while they bring enough of the missing words, or a missing number."""
    passages = quote.source.passages
    while quote.last - quote.first + 1 < MAX_QUOTE_SENTENCES:
        missing = words - quote.matched
        neighbours = [place for place in (quote.first - 1, quote.last + 1) if 0 <= place < len(passages)]
        best = max(neighbours, key=lambda place: len(missing & passages[place].words), default=None)
        if best is None:
            break
        gained = missing & passages[best].words
        if len(gained) < WORDS_WORTH_A_SENTENCE and not any(word[0].isdigit() for word in gained):
            break
        quote = _Quote(quote.source, min(quote.first, best), max(quote.last, best), quote.matched | gained)
    return quote


def _add(citations: dict[tuple[str, int, int], Citation], quote: _Quote) -> None:
    found = quote.source.found
    chunk = found.chunk
    start, end = quote.source.passages[quote.first].start, quote.source.passages[quote.last].end
    char_start, char_end = chunk.char_start + start, chunk.char_start + end
    citation = Citation(found.document_id, chunk.chunk_id, char_start, char_end, chunk.text[start:end], quote.source.number, chunk.page)
    citations.setdefault((found.document_id, char_start, char_end), citation)
