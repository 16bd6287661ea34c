"""Rows of keys and values: what is written is seen, what is hidden stays hidden, and memory comes and goes with tokens."""

import psutil
import pytest
import torch

from server.inference.cache import CacheShape, RowCache, Step

SHAPE = CacheShape(layers=2, key_value_heads=3, head_size=8, tokens_per_row=256, dtype=torch.float32, device=torch.device("cpu"))


def write(cache: RowCache, first_row: int, positions: torch.Tensor, value: float) -> tuple[torch.Tensor, torch.Tensor]:
    step = Step(first_row, positions, int(positions.max()) + 1, torch.float32)
    cache.begin(step)
    new = torch.full((*positions.shape, 6, 8), value)
    new[:, :, 3:] += 0.5
    return cache.write(1, new)


def test_rows_of_different_lengths_take_one_token_each() -> None:
    cache = RowCache(SHAPE, rows=3)
    write(cache, 0, torch.arange(5).unsqueeze(0), 1.0)
    write(cache, 1, torch.arange(2).unsqueeze(0), 2.0)
    keys, values = write(cache, 0, torch.tensor([[5], [2]]), 3.0)
    assert keys.shape == values.shape == (2, 3, 6, 8)
    assert keys[0, 0, :, 0].tolist() == [1.0] * 5 + [3.0]
    assert keys[1, 0, :, 0].tolist() == [2.0, 2.0, 3.0, 0.0, 0.0, 0.0]
    assert values[1, 2, 2, 7] == 3.5


def test_a_mask_shows_each_row_its_past_within_its_window_once_per_query_head() -> None:
    step = Step(0, torch.tensor([[3], [1]]), 4, torch.float32)
    seen = (step.mask(None, 1) == 0).squeeze(1).squeeze(1)
    assert seen.tolist() == [[True] * 4, [True, True, False, False]]
    narrow = (step.mask(2, 1) == 0).squeeze(1).squeeze(1)
    assert narrow.tolist() == [[False, False, True, True], [True, True, False, False]]
    piece = Step(0, torch.tensor([[1, 2]]), 3, torch.float32)
    assert torch.equal(piece.mask(None, 2), torch.cat((piece.mask(None, 1), piece.mask(None, 1)), dim=2))


def test_a_moved_row_has_the_same_tokens_and_a_cleared_one_none() -> None:
    cache = RowCache(SHAPE, rows=3)
    write(cache, 2, torch.arange(7).unsqueeze(0), 4.0)
    cache.move_row(2, 0, tokens=7)
    cache.clear_row(2)
    assert cache._pool[0, 1, 0, :8, 0].tolist() == [4.0] * 7 + [0.0]
    assert not cache._pool[2].any()


def test_rows_may_be_more_together_than_the_machine_has_memory() -> None:
    rows = 2 * psutil.virtual_memory().total // (SHAPE.token_bytes * SHAPE.tokens_per_row)
    cache = RowCache(SHAPE, rows)
    keys, _ = write(cache, rows - 1, torch.arange(3).unsqueeze(0), 1.0)
    assert keys.tolist() == torch.ones(1, 3, 3, 8).tolist()


@pytest.mark.parametrize("everything", [True, False])
def test_memory_follows_the_tokens_and_is_given_back(everything: bool) -> None:
    large = CacheShape(layers=8, key_value_heads=8, head_size=64, tokens_per_row=4096, dtype=torch.float32, device=torch.device("cpu"))
    process = psutil.Process()
    before = process.memory_info().rss
    cache = RowCache(large, rows=8)
    assert process.memory_info().rss - before < 8 << 20, "an unused gigabyte takes no memory"
    cache._pool[3, :, :, :2048] = 1.0
    filled = process.memory_info().rss
    assert filled - before > 50 << 20
    if everything:
        cache.clear_all()
    else:
        cache.clear_row(3)
    assert process.memory_info().rss < filled - (50 << 20)
    assert not cache._pool[3, 0].any()


def test_a_forward_pass_without_begin_is_a_mistake_that_is_named() -> None:
    with pytest.raises(RuntimeError, match="begin"):
        RowCache(SHAPE, rows=1).get_seq_length()
