"""A pseudo-random permutation of 0 .. n-1 that is computed, not stored.

Shuffling tens of millions of frames in every process would take memory and time; here any place of the shuffled
order is found at once, which also makes resuming at any place exact and free.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

_ROUNDS = 6
"""Feistel rounds; four make a pseudo-random permutation of a good round function, two more are margin."""


def permute(index: np.ndarray, size: int, key: int) -> np.ndarray:
    """Return where a permutation of range(size) sends some numbers.

    A balanced Feistel network permutes the next power of four; numbers that leave range(size) walk on until
    they are back (Black and Rogaway, 2002), fewer than four steps on average.

    Args:
        index: int64, any shape, values in [0, size).
        size: How many numbers are permuted, at least 1.
        key: Which permutation; equal keys give equal permutations.

    Returns:
        int64 of the same shape, values in [0, size).
    """
    half = max(1, (int(size - 1).bit_length() + 1) // 2)
    keys = _round_keys(key)
    values = _feistel(np.asarray(index).astype(np.uint64), half, keys)
    outside = values >= size
    while outside.any():
        values[outside] = _feistel(values[outside], half, keys)
        outside = values >= size
    return values.astype(np.int64)


@lru_cache(maxsize=4096)
def _round_keys(key: int) -> np.ndarray:
    return np.random.SeedSequence(key).generate_state(_ROUNDS, np.uint64)


def _feistel(values: np.ndarray, half: int, keys: np.ndarray) -> np.ndarray:
    bits = np.uint64(half)
    mask = np.uint64((1 << half) - 1)
    left, right = values >> bits, values & mask
    for key in keys:
        left, right = right, left ^ (_mix(right + key) & mask)
    return (left << bits) | right


def _mix(values: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser (Steele, Lea and Flood, 2014): every input bit changes every output bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
