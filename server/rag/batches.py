"""Texts of like length together: the batches of a pass over a transformer."""

from collections.abc import Sequence


def cut_batches(lengths: Sequence[int], tokens_per_batch: int) -> list[list[int]]:
    """Cut places, longest first, into batches of at most so many tokens, padding included; of one text at least."""
    batches: list[list[int]] = []
    room = 0
    for place in sorted(range(len(lengths)), key=lambda place: lengths[place], reverse=True):
        if room <= 0:
            batches.append([])
            room = max(1, tokens_per_batch // max(1, lengths[place]))
        batches[-1].append(place)
        room -= 1
    return batches
