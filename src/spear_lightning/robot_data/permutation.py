"""A pseudo-random permutation of 0 .. n-1 that is computed, not stored.

Shuffling tens of millions of frames in every process would take memory and time; here any place of the shuffled
order is found at once, which also makes resuming at any place exact and free.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

_ROUNDS = 6
"""Feistel rounds; four make a pseudo-random permutation of a good round function, two more are margin."""


def permute(index: np.ndarray, size: int, key: int) -> np.ndarray:
    """Return where a permutation of range(size) sends some numbers.

    A Feistel network with additions modulo a and b, a b >= size, permutes range(a b); the few numbers that leave
    range(size) walk on until they are back (Black and Rogaway, 2002).

    Args:
        index: int64, any shape, values in [0, size).
        size: How many numbers are permuted, at least 1.
        key: Which permutation; equal keys give equal permutations.

    Returns:
        int64 of the same shape, values in [0, size).
    """
    return permute_each(index, size, [key], np.zeros(np.shape(index), np.int64))


def permute_each(index: np.ndarray, size: int, keys: Sequence[int], which: np.ndarray) -> np.ndarray:
    """Do as `permute`, with a permutation for every number.

    Args:
        index: int64, any shape, values in [0, size).
        size: How many numbers are permuted, at least 1.
        keys: The permutations.
        which: int64, shaped as `index`: the place in `keys` of each number's permutation.

    Returns:
        int64 of the same shape, values in [0, size).
    """
    a = math.isqrt(size - 1) + 1
    b = -(-size // a)
    rounds = np.stack([_round_keys(key) for key in keys], axis=1)[:, which]
    values = _feistel(np.asarray(index).astype(np.uint64), np.uint64(a), np.uint64(b), rounds)
    outside = values >= size
    while outside.any():
        values[outside] = _feistel(values[outside], np.uint64(a), np.uint64(b), rounds[:, outside])
        outside = values >= size
    return values.astype(np.int64)


@lru_cache(maxsize=4096)
def _round_keys(key: int) -> np.ndarray:
    return np.random.SeedSequence(key).generate_state(_ROUNDS, np.uint64)


def _feistel(values: np.ndarray, a: np.uint64, b: np.uint64, keys: np.ndarray) -> np.ndarray:
    """Permute range(a b): numbers are pairs (left < a, right < b), each shifted by a function of the other."""
    left, right = np.divmod(values, b)
    for first, second in zip(keys[::2], keys[1::2], strict=True):
        left = (left + _mix(right + first)) % a
        right = (right + _mix(left + second)) % b
    return left * b + right


def _mix(values: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser (Steele, Lea and Flood, 2014), halved so that sums with it do not overflow."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (values ^ (values >> np.uint64(31))) >> np.uint64(1)
