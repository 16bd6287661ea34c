"""The two products that kernels are made of, a vector with some rows of a matrix and a weighted sum of rows, and the exponential."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit

from server.inference.kernels.memory import load, load_half, scale_by_power, store, store_half

# Sums may be formed in any order, and a product and a sum rounded once. Numbers that are not finite stay what they are.
compiled: Callable[[Callable[..., Any]], Callable[..., Any]] = njit(fastmath={"reassoc", "contract", "nsz", "arcp"}, error_model="numpy")
# As it is written.
exact: Callable[[Callable[..., Any]], Callable[..., Any]] = njit(fastmath={"contract"}, error_model="numpy")
_LOG2_E, _LN2_HIGH, _LN2_LOW = np.float32(1.4426950408889634), np.float32(0.693359375), np.float32(-2.12194440e-4)
# Beyond it float32 has no normal numbers.
_LARGEST_EXPONENT = np.float32(87.0)


@compiled
def widen(halves: int, numbers: int, count: int) -> None:
    """Copy bfloat16 to float32."""
    for i in range(count):
        store(numbers, i, load_half(halves, i))


@compiled
def narrow(numbers: int, halves: int, count: int) -> None:
    """Copy float32 to bfloat16."""
    for i in range(count):
        store_half(halves, i, load(numbers, i))


@compiled
def multiply_rows(x: int, rows: int, stride: int, count: int, width: int, out: int) -> None:
    """Give out[j] = sum of x[i] x rows[j][i], for `count` rows of bfloat16 that lie `stride` bytes apart; x and out are float32."""
    j = 0
    while j + 4 <= count:
        a = rows + j * stride
        b, c, d = a + stride, a + 2 * stride, a + 3 * stride
        s, t, u, v = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
        for i in range(width):
            number = load(x, i)
            s += number * load_half(a, i)
            t += number * load_half(b, i)
            u += number * load_half(c, i)
            v += number * load_half(d, i)
        store(out, j, s)
        store(out, j + 1, t)
        store(out, j + 2, u)
        store(out, j + 3, v)
        j += 4
    while j < count:
        a = rows + j * stride
        s = np.float32(0)
        for i in range(width):
            s += load(x, i) * load_half(a, i)
        store(out, j, s)
        j += 1


@compiled
def add_rows(weights: int, rows: int, stride: int, count: int, width: int, out: int) -> None:
    """Do out[i] += sum of weights[j] x rows[j][i], for `count` rows of bfloat16 that lie `stride` bytes apart; the others are float32."""
    j = 0
    while j + 4 <= count:
        a = rows + j * stride
        b, c, d = a + stride, a + 2 * stride, a + 3 * stride
        s, t, u, v = load(weights, j), load(weights, j + 1), load(weights, j + 2), load(weights, j + 3)
        for i in range(width):
            store(out, i, load(out, i) + s * load_half(a, i) + t * load_half(b, i) + u * load_half(c, i) + v * load_half(d, i))
        j += 4
    while j < count:
        a, s = rows + j * stride, load(weights, j)
        for i in range(width):
            store(out, i, load(out, i) + s * load_half(a, i))
        j += 1


@exact
def exponentiate(x: np.float32) -> np.float32:
    """Give e^x to a relative 3e-7, for x beyond +-87 as for those; NaN for NaN.

    By e^x = 2^n e^r and the Taylor polynomial of e^r up to r^7, where |r| <= ln 2 / 2. Loops over it become vector code.
    """
    bounded = min(max(x, -_LARGEST_EXPONENT), _LARGEST_EXPONENT)
    n = np.floor(bounded * _LOG2_E + np.float32(0.5))
    r = bounded - n * _LN2_HIGH - n * _LN2_LOW
    p = np.float32(1 / 5040)
    p = p * r + np.float32(1 / 720)
    p = p * r + np.float32(1 / 120)
    p = p * r + np.float32(1 / 24)
    p = p * r + np.float32(1 / 6)
    p = p * r + np.float32(0.5)
    p = p * r + np.float32(1)
    p = p * r + np.float32(1)
    power = scale_by_power(p, np.int32(n))
    return x if x != x else power
