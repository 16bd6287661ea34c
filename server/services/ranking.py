"""Measures of rankings: what a list of chunks holds of what was sought, averages, and what differs between two ways to search.

Relevance is a matter of places in documents, never of chunks, so that a measure means the same however documents are cut.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter

from server.domain.retrieval import RetrievedChunk
from server.domain.retrieval_evaluation import Difference, Latency, Span

RANKED = 10  # MRR@10 and nDCG@10
# The share of the shorter of chunk and passage that both must hold. A passage that is cut in two is found with its larger half.
LEAST_SHARE = 0.5
BOOTSTRAP_SAMPLES = 1_000
INTERVAL = 0.95


@dataclass(frozen=True, slots=True)
class Ranking:
    """For each relevant passage of a query the rank (from 1) of the first chunk that holds it, or None; and how many chunks there are."""

    ranks: Sequence[int | None]
    chunk_count: int

    def recall(self, k: int) -> float:
        """The share of the passages that the first k chunks hold."""
        return sum(rank is not None and rank <= k for rank in self.ranks) / len(self.ranks)

    @property
    def reciprocal_rank(self) -> float:
        """One over the rank of the first chunk that holds a passage, 0 beyond the tenth."""
        first = min((rank for rank in self.ranks if rank is not None and rank <= RANKED), default=None)
        return 1 / first if first else 0.0

    @property
    def gain(self) -> float:
        """nDCG@10 (Järvelin and Kekäläinen, 2002) with a gain of 1 for each passage, where it is first found.

        Of passages that one chunk holds together the second counts as if it stood behind the first, so that 1 is the best there is.
        """
        found = sorted(rank for rank in self.ranks if rank is not None and rank <= RANKED)
        gained = math.fsum(_discount(max(rank, place)) for place, rank in enumerate(found, start=1))
        return gained / math.fsum(_discount(place) for place in range(1, min(len(self.ranks), RANKED) + 1))


def rank_chunks(chunks: Sequence[RetrievedChunk], relevant: Sequence[Sequence[Span]]) -> Ranking:
    """Find each relevant passage (any of its places will do) among chunks, best first."""
    ranks = [next((rank for rank, chunk in enumerate(chunks, start=1) if _holds(chunk, places)), None) for places in relevant]
    return Ranking(ranks, len(chunks))


def compare(measure: str, values: Sequence[float], baseline: Sequence[float], seed: int) -> Difference:
    """Give the difference of two averages over the same queries, with the interval of the paired bootstrap (Efron, percentiles)."""
    differences = [value - base for value, base in zip(values, baseline, strict=True)]
    count = len(differences)
    mean = math.fsum(differences) / count
    if count == 1 or not any(differences):
        return Difference(measure, mean, mean, mean)
    chance = random.Random(seed)  # noqa: S311  # statistics, no secret
    places = range(count)
    means = sorted(math.fsum(itemgetter(*chance.choices(places, k=count))(differences)) / count for _ in range(BOOTSTRAP_SAMPLES))
    beyond = (1 - INTERVAL) / 2
    return Difference(measure, mean, _percentile(means, beyond), _percentile(means, 1 - beyond))


def summarise(stage: str, seconds: Sequence[float]) -> Latency:
    """Give the median and the 99th percentile of a stage."""
    ordered = sorted(seconds)
    return Latency(stage, _percentile(ordered, 0.5), _percentile(ordered, 0.99))


def average(values: Sequence[float]) -> float:
    """Give the mean."""
    return math.fsum(values) / len(values)


def _holds(found: RetrievedChunk, places: Sequence[Span]) -> bool:
    return any(place.document_id == found.document_id and _overlaps(found, place) for place in places)


def _overlaps(found: RetrievedChunk, place: Span) -> bool:
    if place.char_start is None or place.char_end is None:
        return True
    start, end = found.chunk.char_start, found.chunk.char_end
    shared = min(end, place.char_end) - max(start, place.char_start)
    return shared > 0 and shared >= LEAST_SHARE * min(end - start, place.char_end - place.char_start)


def _discount(rank: int) -> float:
    return 1 / math.log2(rank + 1)


def _percentile(ordered: Sequence[float], share: float) -> float:
    """Take a percentile of sorted values, between two of them in proportion."""
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)
