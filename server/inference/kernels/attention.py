"""Attention of rows of different lengths that each make one token: rotation by position, the cache's new entry, scores, values."""

import ctypes

import numpy as np
import torch

from server.inference.kernels.memory import from_order, load, load_half, load_integer, store, store_half, to_order
from server.inference.kernels.products import add_rows, compiled, exponentiate, multiply_rows, narrow
from server.inference.kernels.team import (
    FIRST_OWN,
    HALF_BYTES,
    NUMBER_BYTES,
    Block,
    Kernel,
    Team,
    find_scratch,
    thread_count,
    thread_number,
)

_ROWS, _HEADS, _KEY_HEADS, _SIZE, _SHARE, _WINDOW, _SCALING = range(FIRST_OWN, FIRST_OWN + 7)
_MERGED, _COSINE, _SINE, _POSITIONS, _CACHE, _ROW_BYTES, _HEAD_BYTES, _OUT = range(FIRST_OWN + 7, FIRST_OWN + 15)


@compiled
def _rotate(head: int, cosine: int, sine: int, scale: np.float32, size: int, out: int) -> None:
    """Turn a head by its position, times a scale; the sign of the half turn is in the sine. bfloat16 to float32."""
    half = size // 2
    for i in range(half):
        lower, upper = load_half(head, i), load_half(head, half + i)
        store(out, i, (lower * load_half(cosine, i) + upper * load_half(sine, i)) * scale)
        store(out, half + i, (upper * load_half(cosine, half + i) + lower * load_half(sine, half + i)) * scale)


@compiled
def _normalize(scores: int, count: int) -> np.float32:
    """Turn scores to weights in place; give their sum."""
    order = to_order(load(scores, 0))
    for i in range(1, count):
        order = max(order, to_order(load(scores, i)))
    largest = from_order(order)
    total = np.float32(0)
    for i in range(count):
        weight = exponentiate(load(scores, i) - largest)
        store(scores, i, weight)
        total += weight
    return total


def _attend(block: int) -> None:
    """Do this thread's share of the (row, heads of one key head). A row's new key and value are taken from where they were computed."""
    heads, key_heads, size = load_integer(block, _HEADS), load_integer(block, _KEY_HEADS), load_integer(block, _SIZE)
    share, window = load_integer(block, _SHARE), load_integer(block, _WINDOW)
    groups, head_bytes, token_bytes = heads // key_heads, load_integer(block, _HEAD_BYTES), size * HALF_BYTES
    query = find_scratch(block)
    sums = query + size * NUMBER_BYTES
    new_key = sums + size * NUMBER_BYTES
    scores = new_key + size * NUMBER_BYTES
    scaling = load(load_integer(block, _SCALING), 0)
    shares = heads // share
    for item in range(thread_number(), load_integer(block, _ROWS) * shares, thread_count()):
        row, first_head = item // shares, item % shares * share
        key_head = first_head // groups
        position = load_integer(load_integer(block, _POSITIONS), row)
        merged = load_integer(block, _MERGED) + row * (heads + 2 * key_heads) * token_bytes
        cosine, sine = load_integer(block, _COSINE) + row * token_bytes, load_integer(block, _SINE) + row * token_bytes
        keys = load_integer(block, _CACHE) + row * load_integer(block, _ROW_BYTES) + key_head * head_bytes
        values = keys + key_heads * head_bytes
        new_value = merged + (heads + key_heads + key_head) * token_bytes
        _rotate(merged + (heads + key_head) * token_bytes, cosine, sine, np.float32(1), size, sums)
        narrow(sums, new_key, size)
        if first_head % groups == 0:
            narrow(sums, keys + position * token_bytes, size)
            for i in range(size):
                store_half(values + position * token_bytes, i, load_half(new_value, i))
        start = max(0, position - window + 1) if window > 0 else 0
        seen, behind = position - start, start * token_bytes
        for head in range(first_head, first_head + share):
            _rotate(merged + head * token_bytes, cosine, sine, scaling, size, query)
            multiply_rows(query, keys + behind, token_bytes, seen, size, scores)
            multiply_rows(query, new_key, token_bytes, 1, size, scores + seen * NUMBER_BYTES)
            total = _normalize(scores, seen + 1)
            for i in range(size):
                store(sums, i, np.float32(0))
            add_rows(scores, values + behind, token_bytes, seen, size, sums)
            add_rows(scores + seen * NUMBER_BYTES, new_value, token_bytes, 1, size, sums)
            out = load_integer(block, _OUT) + (row * heads + head) * token_bytes
            for i in range(size):
                store_half(out, i, load(sums, i) / total)


_KERNEL = Kernel(_attend)


class RowAttention:
    """Attention of one layer over its part of the cache; sizes stay the same for its life."""

    def __init__(self, team: Team, heads: int, key_heads: int, size: int, scaling: float) -> None:
        self._team, self._scaling = team, ctypes.c_float(scaling)
        self._block = Block(0, heads, key_heads, size, 0, 0, ctypes.addressof(self._scaling), *[0] * 8)

    def attend(
        self,
        merged: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        positions: torch.Tensor,
        cache: torch.Tensor,
        longest: int,
        window_tokens: int | None,
    ) -> torch.Tensor:
        """Give [rows, 1, heads x size] for merged queries, keys and values [rows, 1, heads + 2 key heads, size] before their rotation.

        `rotary` holds cosine and signed sine [rows, ..., size], `positions` [rows, 1] int64 says where each row's new token stands; its key
        and value are put there in `cache` [rows, 2 x key heads, tokens, size]. `longest` is the largest position + 1.
        Raises IndexError for one that the cache does not have: the kernel would write there all the same.
        """
        if longest > cache.shape[2] or merged.shape[0] > cache.shape[0]:
            raise IndexError(f"{merged.shape[0]} rows of up to {longest} tokens in a cache of {cache.shape[0]} of {cache.shape[2]}")
        merged, cosine, sine, positions = merged.contiguous(), rotary[0].contiguous(), rotary[1].contiguous(), positions.contiguous()
        values, rows = self._block.values, merged.shape[0]
        heads, key_heads, size = values[_HEADS], values[_KEY_HEADS], values[_SIZE]
        out = merged.new_empty(rows, 1, heads * size)
        groups = heads // key_heads
        # Heads that share a key head stay together where there is enough to share out without them.
        values[_SHARE] = groups if rows * key_heads >= 2 * torch.get_num_threads() else 1
        values[_ROWS], values[_WINDOW] = rows, window_tokens or 0
        values[_MERGED], values[_COSINE], values[_SINE] = merged.data_ptr(), cosine.data_ptr(), sine.data_ptr()
        values[_POSITIONS], values[_CACHE], values[_OUT] = positions.data_ptr(), cache.data_ptr(), out.data_ptr()
        values[_ROW_BYTES], values[_HEAD_BYTES] = cache.stride(0) * HALF_BYTES, cache.stride(1) * HALF_BYTES
        self._team.run(_KERNEL, self._block, 2 * rows * heads * size * longest, 3 * size + longest)
        return out
