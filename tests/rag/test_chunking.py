"""Chunks: exact pieces of the original text that cover it, end at sentences, and never exceed what the model reads."""

import random
import re
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from server.domain.catalogue import Pooling, Preparation
from server.domain.retrieval import Chunking
from server.rag.chunking import MAX_CHARACTERS_PER_TOKEN, TextChunk, cut_text
from server.rag.profiles import EmbeddingProfile
from server.rag.tokenization import EmbeddingTokenizer

WORDS = [
    *(
        "the",
        "library",
        "holds",
        "maps",
        "3.14",
        "e.g.",
        "Dr.",
        "naïve",
        "co-operate",
        "https://example.org/a/very/long/path?with=words&more",
    ),
    *("أَحْمَد", "المدرسة", "كتابٌ", "١٢٣", "في", "البيت،", "والكتب", "ـــــ", "ﷺ", "図書館は駅の近くにあります", "👩\u200d👩\u200d👧"),
    *("\u200bzero", "<b>x</b>", "&amp;", "&#1605;"),
]
MARKS = [". ", "! ", "? ", "؟ ", "؛", "... ", "\n", "\n\n", "  ", " ", " ", " ", " ", "\t", "\u00a0", "\r\n"]
# Twenty times the length may take at most this many times as long; linear is 20, quadratic 400.
LINEAR_GROWTH = 60


class LetterTokenizer:
    """Every letter is a token, two special ones; the model reads 20."""

    max_tokens = 20
    overhead_tokens = 2

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        return [2 + len(places) for places in self.find_tokens(texts)]

    def find_tokens(self, texts: Sequence[str]) -> list[list[int]]:
        return [[match.start() for match in re.finditer(r"\S", text)] for text in texts]


class WordTokenizer(LetterTokenizer):
    """Every word is a token, two special ones; the model reads 512."""

    max_tokens = 512

    def find_tokens(self, texts: Sequence[str]) -> list[list[int]]:
        return [[match.start() for match in re.finditer(r"\S+", text)] for text in texts]


class DearTokenizer(WordTokenizer):
    """A piece that stands alone takes twice the tokens that it takes inside a text."""

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        return [2 + 2 * len(places) for places in self.find_tokens(texts)]


@pytest.fixture(scope="module")
def wordpiece(minilm_directory: Path) -> Tokenizer:
    return Tokenizer.from_file(str(minilm_directory / "tokenizer.json"))


def make_tokenizer(
    wordpiece: Tokenizer, max_tokens: int = 256, prefix: str = "", preparation: Preparation = Preparation.NONE
) -> EmbeddingTokenizer:
    profile = EmbeddingProfile("x/y", max_tokens, Pooling.MEAN, passage_prefix=prefix, preparation=preparation)
    return EmbeddingTokenizer(wordpiece, profile)


def make_text(seed: int, words: int = 400) -> str:
    chance = random.Random(seed)  # noqa: S311 -- repeatable, not secret
    return "".join(chance.choice(WORDS) + chance.choice(MARKS) for _ in range(words))


def check_cover(text: str, chunks: Sequence[TextChunk]) -> None:
    """Each chunk begins behind the last one's beginning, ends behind its end, and what is between chunks is white space."""
    end = 0
    for chunk in chunks:
        assert text[end : max(end, chunk.char_start)].strip() == ""
        assert chunk.char_end > end
        piece = text[chunk.char_start : chunk.char_end]
        assert piece == piece.strip()
        end = chunk.char_end
    assert text[end:].strip() == ""
    starts = [chunk.char_start for chunk in chunks]
    assert starts == sorted(set(starts))


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("preparation", [Preparation.NONE, Preparation.ARABERT_V02, Preparation.UNDIACRITIZED])
def test_random_texts_are_covered_by_chunks_that_the_model_reads_whole(wordpiece: Tokenizer, seed: int, preparation: Preparation) -> None:
    chance = random.Random(seed)  # noqa: S311 -- repeatable, not secret
    tokenizer = make_tokenizer(wordpiece, chance.choice([16, 64, 256]), chance.choice(["", "passage: "]), preparation)
    text = make_text(seed)
    chunks = cut_text(text, Chunking(chance.choice([0, 12, 100]), chance.choice([0, 4, 32])), tokenizer)
    check_cover(text, chunks)
    counts = tokenizer.count_tokens([text[chunk.char_start : chunk.char_end] for chunk in chunks])
    assert max(counts) <= tokenizer.max_tokens
    assert [count - tokenizer.overhead_tokens for count in counts] == [chunk.token_count for chunk in chunks]


def test_no_chunk_exceeds_what_was_asked_for(wordpiece: Tokenizer) -> None:
    chunks = cut_text(make_text(1), Chunking(50, 10), make_tokenizer(wordpiece))
    assert max(chunk.token_count for chunk in chunks) <= 50
    assert len(chunks) > 10


def test_chunks_have_at_most_256_tokens_where_nothing_was_asked_for(wordpiece: Tokenizer) -> None:
    chunks = cut_text(make_text(2, 3_000), Chunking(0, 0), make_tokenizer(wordpiece, max_tokens=512))
    assert 200 < max(chunk.token_count for chunk in chunks) <= 256


def test_chunks_end_with_sentences_that_fit() -> None:
    text = "One two three four. Five six seven eight! تسعة عشرة أحد عشر؟ Twelve thirteen fourteen."
    cut = [text[chunk.char_start : chunk.char_end] for chunk in cut_text(text, Chunking(9, 0), WordTokenizer())]
    assert cut == ["One two three four. Five six seven eight!", "تسعة عشرة أحد عشر؟ Twelve thirteen fourteen."]


def test_a_heading_begins_a_chunk_without_overlap_and_short_sections_stay_together() -> None:
    text = "One\nAa bb cc dd.\nTwo\nEe ff gg.\nThree\nHh.\nFour\nIi jj."
    headings = [text.index(name) for name in ("One", "Two", "Three", "Four")]
    cut = [text[chunk.char_start : chunk.char_end] for chunk in cut_text(text, Chunking(12, 3), WordTokenizer(), headings)]
    assert cut == ["One\nAa bb cc dd.", "Two\nEe ff gg.", "Three\nHh.\nFour\nIi jj."]


def test_no_chunk_ends_with_a_heading_whose_text_is_in_the_next() -> None:
    text = "One\nAa bb.\nTwo\nThree\nCc dd ee ff gg hh ii jj kk ll."
    headings = [text.index(name) for name in ("One", "Two", "Three")]
    cut = [text[chunk.char_start : chunk.char_end] for chunk in cut_text(text, Chunking(14, 2), WordTokenizer(), headings)]
    assert cut == ["One\nAa bb.", "Two\nThree\nCc dd ee ff gg hh ii jj kk ll."]


@pytest.mark.parametrize("seed", range(6))
def test_texts_with_headings_anywhere_are_covered_too(seed: int) -> None:
    text = make_text(seed)
    chance = random.Random(seed)  # noqa: S311 -- repeatable, not secret
    headings = sorted(chance.sample(range(len(text)), 60))
    chunks = cut_text(text, Chunking(40, 10), WordTokenizer(), headings)
    check_cover(text, chunks)
    assert max(chunk.token_count for chunk in chunks) <= 40
    assert len(chunks) > len(cut_text(text, Chunking(40, 10), WordTokenizer()))


def test_the_overlap_repeats_whole_sentences_where_they_fit() -> None:
    text = "Aa bb cc dd ee ff. Go now. Ii jj kk ll mm nn. Oo pp qq rr."
    cut = [text[chunk.char_start : chunk.char_end] for chunk in cut_text(text, Chunking(8, 3), WordTokenizer())]
    assert cut == ["Aa bb cc dd ee ff. Go now.", "Go now. Ii jj kk ll mm nn.", "ll mm nn. Oo pp qq rr."]


def test_the_overlap_leaves_room_for_a_whole_sentence() -> None:
    text = "Aa bb cc dd ee ff. Go now. Ii jj kk ll mm nn oo."
    cut = [text[chunk.char_start : chunk.char_end] for chunk in cut_text(text, Chunking(8, 3), WordTokenizer())]
    assert cut == ["Aa bb cc dd ee ff. Go now.", "now. Ii jj kk ll mm nn oo."]


def test_a_sentence_that_is_too_long_is_cut_between_words_and_overlaps_by_words() -> None:
    words = [f"w{number}" for number in range(40)]
    text = " ".join(words) + "."
    chunks = cut_text(text, Chunking(16, 4), WordTokenizer())
    cut = [text[chunk.char_start : chunk.char_end].split() for chunk in chunks]
    assert cut[0] == words[:16]
    assert cut[1] == words[12:28]
    assert cut[-1][-1] == "w39."


def test_pieces_that_take_more_tokens_alone_are_halved_and_none_is_given_twice() -> None:
    text = " ".join(f"w{number}" for number in range(40))
    chunks = cut_text(text, Chunking(8, 4), DearTokenizer())
    check_cover(text, chunks)
    assert max(chunk.token_count for chunk in chunks) <= 8


def test_a_model_that_reads_less_than_a_word_gets_parts_of_it() -> None:
    text = "incomprehensibilities " * 3
    chunks = cut_text(text, Chunking(), LetterTokenizer())
    check_cover(text, chunks)
    assert max(chunk.token_count for chunk in chunks) <= 18


@pytest.mark.parametrize("filler", ["a", "ب", "ab ", "図", "\u0301", "👍🏽", ".", " ", "\n", "a\n", "<&#", "\ud800"])
def test_a_hundred_thousand_odd_characters_are_cut_in_linear_time(wordpiece: Tokenizer, filler: str) -> None:
    tokenizer = make_tokenizer(wordpiece)
    seconds = []
    for length in (5_000, 100_000):
        text = (filler * length)[:length]
        started = time.process_time()
        chunks = cut_text(text, Chunking(), tokenizer)
        seconds.append(time.process_time() - started)
        check_cover(text, chunks)
        assert max((chunk.char_end - chunk.char_start for chunk in chunks), default=0) <= 256 * MAX_CHARACTERS_PER_TOKEN
    assert seconds[1] < LINEAR_GROWTH * max(seconds[0], 0.02)


@pytest.mark.parametrize("text", ["", " \n\t ", "\u2028"])
def test_a_text_without_words_has_no_chunks(text: str) -> None:
    assert cut_text(text, Chunking(), WordTokenizer()) == []


def test_a_word_is_not_cut_between_a_letter_and_its_marks(wordpiece: Tokenizer) -> None:
    text = "بَّ" * 2_000
    for chunk in cut_text(text, Chunking(30, 0), make_tokenizer(wordpiece)):
        assert text[chunk.char_start] == "ب"
