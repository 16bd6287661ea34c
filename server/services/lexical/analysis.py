"""Terms of passages and queries, and what each is worth: stems, and character n-grams of whole words, by BM25.

The same words are made of a passage and of a query. A change here changes what is stored: it needs a migration that analyses every chunk
again, as s0003 does.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from itertools import islice

from server.domain.retrieval import QueryTerm
from server.services.lexical.folding import split_words
from server.services.lexical.stemming import stem
from server.services.lexical.stopwords import is_stop_word

# Terms are numbers from 1: hashes, since nobody has to read them back. Two of a text's thousand terms share one in 1 of 2,000 texts.
TERM_NUMBERS = 1_000_000_000
MAX_PASSAGE_TERMS = 16_000  # pgvector keeps no more numbers other than 0 in a sparsevec
MAX_QUERY_TERMS = 4_000

# BM25 (Robertson and Zaragoza, "The Probabilistic Relevance Framework", 2009) with its usual constants. Lengths are taken against a fixed
# one in place of the collection's mean, so that a passage's weights never change; from half to twice of it makes no difference that counts.
K1 = 1.2
B = 0.75
USUAL_WORDS = 80
USUAL_GRAMS = 320
# N-grams find other forms of a word (broken plurals, compounds, misspellings) where its stem does not; a word has several, and one stem.
GRAM_CHARACTERS = 4
GRAM_BOOST = 0.3
_EDGE = "_"


@dataclass(frozen=True, slots=True)
class PassageTerms:
    """What a passage is found by: BM25's weight of each term but for the term's rarity, and which of the terms are stems."""

    weights: Mapping[int, float]
    words: frozenset[int]


def analyse_passage(text: str) -> PassageTerms:
    """Weigh the terms of a passage; at most 16,000, the heaviest."""
    words, grams = _count_terms(text)
    weights = _weigh(grams, USUAL_GRAMS) | _weigh(words, USUAL_WORDS)
    if len(weights) > MAX_PASSAGE_TERMS:
        weights = dict(sorted(weights.items(), key=lambda item: (-item[1], item[0]))[:MAX_PASSAGE_TERMS])
    return PassageTerms(weights, frozenset(words.keys() & weights.keys()))


def analyse_query(text: str) -> tuple[QueryTerm, ...]:
    """Give the terms of a query, stems first; at most 4,000."""
    words, grams = _count_terms(text)
    terms = [QueryTerm(number, float(count), True) for number, count in words.items()]
    terms += [QueryTerm(number, GRAM_BOOST * count, False) for number, count in grams.items() if number not in words]
    return tuple(islice(terms, MAX_QUERY_TERMS))


def _count_terms(text: str) -> tuple[Counter[int], Counter[int]]:
    words: Counter[int] = Counter()
    grams: Counter[int] = Counter()
    for word in split_words(text):
        number, of_word = _make_terms(word)
        if number:
            words[number] += 1
        grams.update(of_word)
    return words, grams


def _weigh(counts: Counter[int], usual: int) -> dict[int, float]:
    damping = K1 * (1 - B + B * counts.total() / usual)
    return {number: count * (K1 + 1) / (count + damping) for number, count in counts.items()}


@lru_cache(maxsize=100_000)
def _make_terms(word: str) -> tuple[int, tuple[int, ...]]:
    """Give the term of a word's stem, 0 for a stop word, and those of its n-grams."""
    edged = f"{_EDGE}{word}{_EDGE}"
    grams = (edged[place : place + GRAM_CHARACTERS] for place in range(max(1, len(edged) - GRAM_CHARACTERS + 1)))
    return (0 if is_stop_word(word) else _number("w", stem(word))), tuple(_number("g", gram) for gram in grams)


def _number(kind: str, term: str) -> int:
    digest = blake2b(f"{kind}{term}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % TERM_NUMBERS + 1
