"""The stream of training samples of a mixture of data sets: endless, shuffled, and known at every place.

Place p of the stream is a pure function of (seed, p): no state, no buffer, no order stored. So it is the same for
any number of processes and workers, and resumes exactly at any place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Literal

import numpy as np

from spear_lightning.errors import ConfigError
from spear_lightning.robot_data.permutation import permute, permute_each

BLOCK = 1 << 16
"""Places in a block; within each block every data set has its exact share, in shuffled order."""

Weighting = Literal["per_frame", "share"]


def mixture_shares(
    weights: Mapping[str, float],
    sizes: Mapping[str, int],
    weighting: Weighting,
    fixed: Mapping[str, float] | None = None,
) -> np.ndarray:
    """Return each data set's share of the samples.

    Args:
        weights: Data set -> weight, positive.
        sizes: Data set -> frames that may start a chunk.
        weighting: "per_frame": shares are proportional to weight times size, as in the OXE mixtures;
            "share": to the weights alone.
        fixed: Data set -> its share, whatever its weight; the others divide the rest among them.

    Returns:
        float64, in the order of `weights`, summing to one.

    Raises:
        ConfigError: If a weight is not positive, or the fixed shares leave nothing for the others.
    """
    fixed = fixed or {}
    wrong = {name: weight for name, weight in weights.items() if not (np.isfinite(weight) and weight > 0)}
    if wrong or not weights:
        raise ConfigError(
            "Mixture weights must be positive",
            where="data.mixture",
            found=wrong or "no data sets",
            remedy="leave data sets out that are not wanted",
        )
    free = np.array([name not in fixed for name in weights])
    taken = sum(fixed.values())
    if (
        set(fixed) - set(weights)
        or not all(0 < share <= 1 for share in fixed.values())
        or (taken >= 1 if free.any() else not np.isclose(taken, 1))
    ):
        raise ConfigError(
            "The fixed shares of the mixture do not work out",
            where="data.shares",
            found=f"{dict(fixed)}, in all {taken:g}",
            expected=f"positive shares of some of {sorted(weights)}, in all below 1 (1 if they are all)",
        )
    masses = np.array([w * (sizes[name] if weighting == "per_frame" else 1) for name, w in weights.items()])
    shares = np.array([fixed.get(name, 0.0) for name in weights])
    shares[free] = (1 - taken) * masses[free] / masses[free].sum()
    return shares


class SampleStream:
    """Place in the stream -> (data set, sample of that data set).

    Every data set is gone through in epochs of its own: each of its samples comes once before any comes again,
    in an order that differs from epoch to epoch.

    Args:
        sizes: Samples of each data set, at least 1 each.
        shares: Share of each data set; positive, summing to one. Realised to 1 / 65536, at least that.
        seed: Of all shuffling.
    """

    def __init__(self, sizes: Sequence[int], shares: np.ndarray, seed: int) -> None:
        self.sizes = [int(size) for size in sizes]
        self.seed = seed
        self._quota = _quotas(np.asarray(shares, np.float64))
        self._upper = np.cumsum(self._quota)

    def __getitem__(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (data set, sample), both int64 (n,), of places (n,) >= 0."""
        places = np.asarray(places, np.int64)
        block, inside = places // BLOCK, places % BLOCK
        slot = np.empty_like(places)
        for number in np.unique(block):
            chosen = block == number
            slot[chosen] = permute(inside[chosen], BLOCK, _key(self.seed, 0, int(number)))
        dataset = np.searchsorted(self._upper, slot, side="right")
        occurrence = block * self._quota[dataset] + slot - (self._upper - self._quota)[dataset]
        sample = np.empty_like(places)
        for number in np.unique(dataset):
            chosen, size = dataset == number, self.sizes[number]
            lap, place = np.divmod(occurrence[chosen], size)
            # A small data set is in many of its laps within one batch: all at once.
            laps, which = np.unique(lap, return_inverse=True)
            keys = [_key(self.seed, 1 + int(number), int(each)) for each in laps]
            sample[chosen] = permute_each(place, size, keys, which)
        return dataset, sample


@lru_cache(maxsize=4096)
def _key(seed: int, purpose: int, number: int) -> int:
    return int(np.random.SeedSequence([seed, purpose, number]).generate_state(1, np.uint64)[0])


def _quotas(shares: np.ndarray) -> np.ndarray:
    """Divide a block's places by largest remainder, at least one each."""
    exact = shares * (BLOCK - len(shares))
    quota = np.floor(exact).astype(np.int64)
    missing = BLOCK - len(shares) - int(quota.sum())
    quota[np.argsort(quota - exact, kind="stable")[:missing]] += 1
    return quota + 1
