"""Maximal marginal relevance, against the definition computed with whole matrices."""

import numpy
import pytest
from numpy.typing import NDArray

from server.services.diversity import choose_diverse

Numbers = NDArray[numpy.float64]


def choose_by_definition(vectors: Numbers, query: Numbers, mmr_lambda: float, most: int) -> list[int]:
    """The slow way."""
    relevances, similarities = vectors @ query, vectors @ vectors.T
    chosen: list[int] = []
    while len(chosen) < min(most, len(vectors)):
        left = [place for place in range(len(vectors)) if place not in chosen]
        marginal = [mmr_lambda * relevances[i] - (1 - mmr_lambda) * (similarities[i, chosen].max() if chosen else 0) for i in left]
        chosen.append(left[int(numpy.argmax(marginal))] if chosen else int(numpy.argmax(relevances)))
    return chosen


@pytest.mark.parametrize("mmr_lambda", [0.0, 0.3, 0.7, 1.0])
def test_each_choice_has_the_largest_marginal_relevance(mmr_lambda: float) -> None:
    vectors = numpy.random.default_rng(5).normal(size=(30, 6))
    vectors /= numpy.linalg.norm(vectors, axis=1, keepdims=True)
    query = vectors[3] + 0.1
    vectors = vectors[numpy.argsort(-(vectors @ query))]
    pairs = [[float(vectors[i] @ vectors[j]) for j in range(i)] for i in range(len(vectors))]
    relevances = [float(relevance) for relevance in vectors @ query]
    assert choose_diverse(relevances, pairs, mmr_lambda, 10) == choose_by_definition(vectors, query, mmr_lambda, 10)


def test_relevance_alone_keeps_the_order() -> None:
    assert choose_diverse([0.9, 0.5, 0.4], [[], [1.0], [1.0, 1.0]], 1.0, 2) == [0, 1]


def test_few_passages_are_all_chosen() -> None:
    assert choose_diverse([], [], 0.5, 3) == []
    assert choose_diverse([0.5, 0.4], [[], [0.9]], 0.0, 3) == [0, 1]
