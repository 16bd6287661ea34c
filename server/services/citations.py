"""Which passages an answer rests on: every citation given here quotes what stands in the document, and supports what was said.

Works on words alone, so that it costs milliseconds and cannot make a quote up.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from server.domain.retrieval import Citation, RetrievedChunk
from server.services.markers import MARKER, read_markers
from server.services.sentences import fold_content_words, fold_words, split_sentences

_LIST_NUMBER = re.compile(r"^\s*\d{1,3}[.)]\s")
# What stands in quotation marks of any kind; what is left out of it (…) parts it.
_QUOTED = re.compile(
    r"“([^“”\n]{1,500})”|„([^„“”\n]{1,500})[“”]|«([^«»\n]{1,500})»|‹([^‹›\n]{1,500})›|\"([^\"\n]{1,500})\"|「([^「」\n]{1,500})」"
    r"|(?<!\w)[‘']([^‘’'\n]{1,500})[’'](?!\w)"
)
_GAP = "\ue000"  # stands for what is left out of a quote
_LEFT_OUT = re.compile(rf"\.{{3,}}|…|\[[…{_GAP}]\]|{_GAP}+")
_DOTS = re.compile(r"\.{3,}|…")
# Ends of sentences as commas, of equal length: inside of a quote or a marker none ends.
_NO_ENDS = str.maketrans(dict.fromkeys(".!?؟؛۔", ","))

# The part of a sentence's content words that a passage must hold. A sentence that names its source is believed sooner.
LEAST_SUPPORT = 0.6
LEAST_SUPPORT_WITHMARKER = 0.3
# Without a marker one common word proves nothing.
LEAST_WORDS = 2
# A quote grows by a neighbouring sentence only for this many more words.
WORDS_WORTH_A_SENTENCE = 2
MAX_QUOTE_SENTENCES = 3
# Fewer words in quotation marks are a name or a term, not what somebody wrote.
LEAST_QUOTED_WORDS = 2


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

    @property
    def quoted(self) -> list[str]:
        """What it puts in quotation marks, folded, each with a space around."""
        pieces = (piece for match in _QUOTED.finditer(self.text) for piece in _LEFT_OUT.split(next(filter(None, match.groups()))))
        folded = (fold_words(piece) for piece in pieces)
        return [f" {' '.join(words)} " for words in folded if len(words) >= LEAST_QUOTED_WORDS]


@dataclass(frozen=True, slots=True)
class _Passage:
    """A sentence of a chunk: its place in the chunk's text, and its words."""

    start: int
    end: int
    words: frozenset[str]


@dataclass(frozen=True, slots=True)
class _Source:
    """A numbered source, cut into sentences; `folded` is its words, with a space around."""

    number: int
    found: RetrievedChunk
    passages: tuple[_Passage, ...]
    folded: str


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

    A marker that names no source, one that does not support its sentence, and those of a sentence that quotes what stands in none of
    them are dropped and counted. Sentences without a
    marker are cited where a source clearly holds them. Offsets are those of the document's original text.
    """
    cut = [_cut(number, found) for number, found in enumerate(sources, start=1)]
    citations: dict[tuple[str, int, int], Citation] = {}
    dropped_count = 0
    for claim in _read_claims(answer, len(cut)):
        words = fold_content_words(claim.text)
        named = [cut[number - 1] for number in claim.sources if 1 <= number <= len(cut)]
        if not _stand_there(claim.quoted, named or cut):
            dropped_count += len(claim.sources)
            continue
        quotes = [quote for source in named if (quote := _find_quote(words, source, LEAST_SUPPORT_WITHMARKER, 1)) is not None]
        dropped_count += len(claim.sources) - len(quotes)
        for quote in quotes:
            _add(citations, quote)
        if not claim.sources and (found := _attribute(claim, words, cut)) is not None:
            _add(citations, found)
    return CheckedCitations(tuple(citations.values()), dropped_count)


def _read_claims(answer: str, count: int) -> list[_Claim]:
    """Cut the answer into sentences with the sources that each one names."""
    answer = MARKER.sub(lambda marker: marker[0].translate(_NO_ENDS), _QUOTED.sub(_hold_together, answer))
    claims: list[_Claim] = []
    last_end = 0
    for start, end in split_sentences(answer):
        # Markers behind a full stop belong to the sentence before, unless they begin a line.
        behind = bool(claims) and "\n" not in answer[last_end:start]
        text_start = _skip_markers(answer, start, end) if behind else start
        _name_sources(claims, answer[start:text_start], count)
        sentence = answer[text_start:end]
        text = _LIST_NUMBER.sub("", MARKER.sub(" ", sentence))
        if fold_words(text):
            claims.append(_Claim(text, read_markers(sentence, count)))
        else:
            _name_sources(claims, sentence, count)
        last_end = end
    return claims


def _hold_together(quoted: re.Match[str]) -> str:
    """Take the ends of sentences out of a quote, but that at its own end."""
    text = quoted[0]
    inner = text.rstrip("\"'”’“»›」 .!?…؟؛۔")
    return _DOTS.sub(lambda dots: _GAP * len(dots[0]), inner).translate(_NO_ENDS) + text[len(inner) :]


def _skip_markers(text: str, start: int, end: int) -> int:
    """Give the place behind the markers that stand at `start`, at most `end`."""
    while match := MARKER.match(text, start, end):
        start = match.end()
        while start < end and text[start].isspace():
            start += 1
    return start


def _name_sources(claims: list[_Claim], markers: str, count: int) -> None:
    """Give markers to the last claim; without one they name sources of nothing, and will be dropped."""
    if named := read_markers(markers, count):
        last = claims.pop() if claims else _Claim("", ())
        claims.append(_Claim(last.text, tuple(dict.fromkeys(last.sources + named))))


def _cut(number: int, found: RetrievedChunk) -> _Source:
    text = found.chunk.text
    passages = (_Passage(start, end, fold_content_words(text[start:end])) for start, end in split_sentences(text))
    return _Source(number, found, tuple(passages), f" {' '.join(fold_words(text))} ")


def _stand_there(quoted: Sequence[str], sources: Sequence[_Source]) -> bool:
    """Say whether each of the quoted texts stands word by word in one of the sources."""
    return all(any(text in source.folded for source in sources) for text in quoted)


def _attribute(claim: _Claim, words: frozenset[str], sources: Sequence[_Source]) -> _Quote | None:
    """Find the source that best supports a sentence without a marker; a short answer must stand there word by word."""
    least_words = LEAST_WORDS
    if len(words) < LEAST_WORDS:
        sources = [source for source in sources if f" {' '.join(fold_words(claim.text))} " in source.folded]
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
    citation = Citation(
        found.document_id, chunk.chunk_id, char_start, char_end, chunk.text[start:end], quote.source.number, found.find_page(char_start)
    )
    citations.setdefault((found.document_id, char_start, char_end), citation)
