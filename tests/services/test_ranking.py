"""Measures of rankings, against figures worked out by hand."""

import math

import pytest

from server.domain.retrieval import Chunk, RetrievedChunk, Scores
from server.domain.retrieval_evaluation import Span
from server.services.ranking import Ranking, compare, rank_chunks, summarise


def chunk(document_id: str, start: int, end: int) -> RetrievedChunk:
    return RetrievedChunk(Chunk("chk_1", 0, "x" * (end - start), start, end, 1), document_id, "", Scores())


def test_recall_counts_the_passages_that_the_first_k_chunks_hold() -> None:
    ranking = Ranking([2, None, 5, 11], 12)
    assert [ranking.recall(k) for k in (1, 2, 5, 10, 11)] == [0, 0.25, 0.5, 0.5, 0.75]


def test_the_reciprocal_rank_is_that_of_the_first_passage_within_ten() -> None:
    assert Ranking([4, 2], 10).reciprocal_rank == 0.5
    assert Ranking([11, None], 12).reciprocal_rank == 0
    assert Ranking([None], 0).reciprocal_rank == 0


def test_the_gain_is_that_of_the_textbook() -> None:
    assert Ranking([1], 10).gain == 1
    assert Ranking([3], 10).gain == pytest.approx(1 / math.log2(4))
    # Two passages at ranks 2 and 4: (1/log2(3) + 1/log2(5)) / (1/log2(2) + 1/log2(3)).
    assert Ranking([4, 2], 10).gain == pytest.approx((0.6309298 + 0.4306766) / (1 + 0.6309298), abs=1e-6)
    assert Ranking([11], 12).gain == 0
    assert Ranking([None, 1], 12).gain == pytest.approx(1 / (1 + 0.6309298), abs=1e-6)


def test_passages_that_one_chunk_holds_together_gain_the_best_there_is_and_no_more() -> None:
    assert Ranking([1, 1, 1], 10).gain == 1
    assert Ranking([1, 1, 2], 10).gain == pytest.approx(1)
    assert Ranking([2, 2], 10).gain == pytest.approx((0.6309298 + 0.6309298) / (1 + 0.6309298), abs=1e-6)
    # More than ten passages cannot stand in ten chunks: ten are perfect.
    assert Ranking(list(range(1, 13)), 12).gain == pytest.approx(1)


def test_a_chunk_holds_a_passage_where_they_share_half_of_the_shorter_one() -> None:
    passage = [[Span("doc_a", 100, 200)]]
    ranks = [
        (chunk("doc_a", 0, 149), None),
        (chunk("doc_a", 0, 150), 1),
        (chunk("doc_a", 120, 130), 1),
        (chunk("doc_a", 195, 215), None),
        (chunk("doc_a", 190, 210), 1),
        (chunk("doc_a", 200, 300), None),
        (chunk("doc_b", 100, 200), None),
    ]
    for found, rank in ranks:
        assert rank_chunks([found], passage).ranks == [rank], (found.chunk.char_start, found.chunk.char_end)


@pytest.mark.parametrize("size", [7, 30, 64, 200])
def test_however_a_document_is_cut_its_chunks_together_hold_every_passage(size: int) -> None:
    chunks = [chunk("doc_a", start, min(start + size, 300)) for start in range(0, 300, size)]
    passages = [[Span("doc_a", start, start + 25)] for start in range(0, 275, 11)]
    assert None not in rank_chunks(chunks, passages).ranks


def test_a_whole_document_and_any_of_several_places_will_do() -> None:
    chunks = [chunk("doc_b", 0, 9), chunk("doc_a", 50, 60), chunk("doc_c", 0, 9)]
    relevant = [[Span("doc_a")], [Span("doc_a", 0, 9), Span("doc_c", 0, 9)], [Span("doc_d")]]
    assert rank_chunks(chunks, relevant) == Ranking([2, 3, None], 3)


def test_the_bootstrap_interval_is_seeded_and_pairs_the_queries() -> None:
    base = [place / 100 for place in range(100)]
    better = [1.0] * 100
    one = compare("mrr_at_10", better, base, 7)
    assert one == compare("mrr_at_10", better, base, 7) != compare("mrr_at_10", better, base, 8)
    assert one.difference == pytest.approx(0.505)
    # The differences 0.01, 0.02 … 1 have the deviation 0.2887: the mean of 100 has a tenth, and 95 % lie within 1.96 of it.
    assert one.low == pytest.approx(0.505 - 0.0566, abs=0.01)
    assert one.high == pytest.approx(0.505 + 0.0566, abs=0.01)


def test_a_difference_that_is_the_same_for_every_query_has_no_width() -> None:
    same = compare("mrr_at_10", [0.75] * 9, [0.5] * 9, 0)
    assert (same.difference, same.low, same.high) == (0.25, 0.25, 0.25)
    assert compare("mrr_at_10", [0.3], [0.3], 0).high == 0


def test_percentiles_lie_between_values_in_proportion() -> None:
    latency = summarise("search", [0.4, 0.1, 0.2, 0.3])
    assert latency.p50_seconds == pytest.approx(0.25)
    assert latency.p99_seconds == pytest.approx(0.397)
    assert summarise("search", [0.5]).p99_seconds == 0.5
