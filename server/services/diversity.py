"""Chooses passages that are relevant and unlike each other, by maximal marginal relevance.

Carbonell and Goldstein, "The Use of MMR, Diversity-Based Reranking for Reordering Documents and Producing Summaries" (1998).
"""

from collections.abc import Sequence


def choose_diverse(relevances: Sequence[float], pairs: Sequence[Sequence[float]], mmr_lambda: float, most: int) -> list[int]:
    """Give the places of at most so many passages, in the order in which they were chosen: the most relevant first.

    `relevances`: 1 for the best there can be; `pairs[i][j]`: the cosine similarity of passage i to an earlier one j. Each choice is the
    passage with the largest `lambda * relevance - (1 - lambda) * similarity to the likest chosen one`.
    """
    left = list(range(len(relevances)))
    likest = [-1.0] * len(left)  # of no passage is less alike
    chosen: list[int] = []
    while left and len(chosen) < most:
        if chosen:
            last = chosen[-1]
            for place in left:
                likest[place] = max(likest[place], pairs[max(place, last)][min(place, last)])
            best = max(left, key=lambda place: (mmr_lambda * relevances[place] - (1 - mmr_lambda) * likest[place], -place))
        else:
            best = max(left, key=lambda place: (relevances[place], -place))
        left.remove(best)
        chosen.append(best)
    return chosen
