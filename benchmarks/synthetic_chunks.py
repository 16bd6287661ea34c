"""Chunks by the million for benchmarks: clustered vectors, passages of words that are as rare as a language's, written with COPY."""

import json
import struct
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy
import psycopg
from numpy.typing import NDArray
from psycopg import sql
from psycopg.rows import TupleRow

from server.db.terms import EVERY_CHUNK, scope_words, write_weights
from server.services.lexical.analysis import PassageTerms, analyse_passage

ORGANIZATION = "benchmark"
DIMENSION = 384
CHUNKS_PER_CLUSTER = 200
SPREAD = 0.6  # of a cluster, as a share of the length of its centre: cosines within it of some 0.75
CHUNKS_PER_DOCUMENT = 4
WORDS_PER_PASSAGE = 40
VOCABULARY = 50_000
GROUPS = 100  # a filter on one keeps 1 %
SYLLABLES = [first + vowel for first in "bdfgklmnprstvz" for vowel in ("a", "e", "i", "o", "u", "ai", "or", "en")]


@dataclass(frozen=True)
class Collection:
    """A model's chunks to be, by their number. Everything about them follows from it."""

    chunks: int

    @property
    def model_id(self) -> str:
        """Its model."""
        return f"mdl_{self.chunks:024d}"

    def make_vectors(self, count: int, seed: int = 8) -> NDArray[numpy.float16]:
        """Unit vectors around the collection's centres, as float16 [count, 384]."""
        count_of_centres = max(1, self.chunks // CHUNKS_PER_CLUSTER)
        centres = _unit(numpy.random.default_rng(7).standard_normal((count_of_centres, DIMENSION)).astype(numpy.float32))
        random, batches = numpy.random.default_rng(seed), []
        for first in range(0, count, 50_000):
            rows = min(50_000, count - first)
            near = centres[random.integers(0, count_of_centres, rows)]
            noise = random.standard_normal((rows, DIMENSION)).astype(numpy.float32) * numpy.float32(SPREAD / DIMENSION**0.5)
            batches.append(_unit(near + noise).astype(numpy.float16))
        return numpy.concatenate(batches)

    def make_passages(self, count: int, words: int = WORDS_PER_PASSAGE, seed: int = 1) -> Iterator[str]:
        """Passages of words whose frequencies fall as Zipf found them."""
        random = numpy.random.default_rng(seed)
        shares = 1 / (numpy.arange(VOCABULARY) + 10.0)
        for first in range(0, count, 10_000):
            for row in random.choice(VOCABULARY, (min(10_000, count - first), words), p=shares / shares.sum()):
                yield " ".join(map(make_word, row.tolist()))


@lru_cache(maxsize=VOCABULARY)
def make_word(number: int) -> str:
    """Make a word of a few syllables."""
    syllables = []
    number += len(SYLLABLES)
    while number:
        number, place = divmod(number, len(SYLLABLES))
        syllables.append(SYLLABLES[place])
    return "".join(syllables)


def load(connection: psycopg.Connection[TupleRow], collection: Collection, vectors: NDArray[numpy.float16] | None) -> None:
    """Write a collection's documents, chunks, terms and, where given, vectors. Its model is there."""
    key = (ORGANIZATION, collection.model_id)
    documents = (
        (*key, _document(n), f"Document {n}", json.dumps({"group": n % GROUPS, "half": n % 2})) for n in range(collection.chunks // 4)
    )
    _copy(connection, "documents (organization, model_id, document_id, title, metadata, chunk_count, state, source_uri, text,"
          " size_characters, size_bytes, content_sha256, error, create_time)",
          ((*each, CHUNKS_PER_DOCUMENT, "INDEXED", "", "", 0, 0, "", "", "2026-01-01") for each in documents))  # fmt: skip
    _copy(connection, "chunks (organization, model_id, document_id, position, index_number, chunk_id, text,"
          " char_start, char_end, token_count)",
          ((*key, *_place(n), 1, f"chk_{n:024d}", passage, 0, len(passage), WORDS_PER_PASSAGE)
           for n, passage in enumerate(collection.make_passages(collection.chunks))))  # fmt: skip
    if vectors is not None:
        _copy_vectors(connection, collection, vectors)
    counts: Counter[int] = Counter()
    _copy(connection, "chunk_terms (organization, model_id, document_id, position, index_number, words, weights)",
          ((*key, *_place(n), 1, *terms) for n, terms in enumerate(_analyse(collection, counts))))  # fmt: skip
    counts[EVERY_CHUNK] = collection.chunks
    _copy(connection, "term_counts (organization, model_id, index_number, term, chunk_count)",
          ((*key, 1, term, count) for term, count in counts.items()))  # fmt: skip


def _analyse(collection: Collection, counts: Counter[int]) -> Iterator[tuple[list[int], str]]:
    scope = scope_words(ORGANIZATION, collection.model_id)
    for passage in collection.make_passages(collection.chunks):
        terms: PassageTerms = analyse_passage(passage)
        counts.update(terms.weights.keys())
        yield [scope | number for number in terms.words], write_weights(terms.weights)


def _copy(connection: psycopg.Connection[TupleRow], table: str, rows: Iterator[Sequence[object]]) -> None:
    with connection.cursor() as cursor, cursor.copy(sql.SQL("COPY {} FROM STDIN").format(sql.SQL(table))) as copy:
        for row in rows:
            copy.write_row(row)


def _copy_vectors(connection: psycopg.Connection[TupleRow], collection: Collection, vectors: NDArray[numpy.float16]) -> None:
    """Vectors in PostgreSQL's binary form: as text they would take minutes."""
    columns = "organization, model_id, document_id, position, index_number, embedding"
    fixed = b"".join(struct.pack(">i", len(each)) + each for each in (ORGANIZATION.encode(), collection.model_id.encode()))
    numbers = vectors.astype(">f2")
    with connection.cursor() as cursor, cursor.copy(f"COPY chunk_vectors ({columns}) FROM STDIN (FORMAT BINARY)") as copy:
        copy.write(b"PGCOPY\n\xff\r\n\0" + struct.pack(">ii", 0, 0))
        for row in range(len(numbers)):
            document, position = _place(row)
            name, vector = document.encode(), struct.pack(">hh", DIMENSION, 0) + numbers[row].tobytes()
            place = struct.pack(">iiii", 4, position, 4, 1)
            copy.write(struct.pack(">h", 6) + fixed + struct.pack(">i", len(name)) + name + place + struct.pack(">i", len(vector)) + vector)
        copy.write(struct.pack(">h", -1))


def _document(number: int) -> str:
    return f"doc_{number:024d}"


def _place(chunk: int) -> tuple[str, int]:
    return _document(chunk // CHUNKS_PER_DOCUMENT), chunk % CHUNKS_PER_DOCUMENT


def _unit(vectors: NDArray[numpy.float32]) -> NDArray[numpy.float32]:
    unit: NDArray[numpy.float32] = vectors / numpy.linalg.norm(vectors, axis=1, keepdims=True)
    return unit
