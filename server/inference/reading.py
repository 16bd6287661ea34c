"""Who reads how much of its prompt in a step."""

from collections.abc import Sequence

from server.inference.generations import Generation


def share_prompt_tokens(reading: Sequence[Generation], budget: int) -> list[tuple[Generation, int]]:
    """Share a step's prompt tokens among those that read, the oldest first in `reading`; none gets more than it has unread.

    The oldest prompt gets half at least, the rest goes to the shortest, so that neither starves. A choice whose prompt an older one
    reads gets nothing: it starts from a copy.
    """
    readers = [generation for place, generation in enumerate(reading) if not any(map(generation.shares_prompt, reading[:place]))]
    if not readers:
        return []
    oldest, others = readers[0], sorted(readers[1:], key=lambda g: g.unread_tokens)
    shares = {oldest.request_id: min(oldest.unread_tokens, (budget + 1) // 2 if others else budget)}
    budget -= shares[oldest.request_id]
    for generation in others:
        shares[generation.request_id] = min(generation.unread_tokens, budget)
        budget -= shares[generation.request_id]
    shares[oldest.request_id] += min(oldest.unread_tokens - shares[oldest.request_id], budget)
    return [(generation, shares[generation.request_id]) for generation in (oldest, *others) if shares[generation.request_id] > 0]
