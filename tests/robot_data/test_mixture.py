"""The sample stream: a true shuffle, exact shares, the same at every place whoever asks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spear_lightning.errors import ConfigError
from spear_lightning.robot_data.mixture import BLOCK, SampleStream, mixture_shares
from spear_lightning.robot_data.permutation import permute


@settings(deadline=None)
@given(size=st.integers(1, 5000), key=st.integers(0, 2**64 - 1))
def test_permutation_is_one(size: int, key: int) -> None:
    assert np.array_equal(np.sort(permute(np.arange(size), size, key)), np.arange(size))


def test_permutation_looks_random() -> None:
    size = 40_000
    order = permute(np.arange(size), size, key=7)
    assert abs(np.corrcoef(np.arange(size), order)[0, 1]) < 0.02
    # Neighbours are sent apart: a shuffle buffer of a tenth would give 0.1 here.
    distances = np.abs(np.diff(order)) / size
    assert abs(distances.mean() - 1 / 3) < 0.01
    assert (permute(np.arange(size), size, key=8) == order).mean() < 0.001


def test_large_sizes_are_cheap_and_in_range() -> None:
    size = 45_000_000
    places = np.random.default_rng(0).integers(0, size, 1000)
    found = permute(places, size, key=1)
    assert found.min() >= 0
    assert found.max() < size
    assert len(np.unique(found)) == len(np.unique(places))


def test_every_sample_comes_once_per_epoch() -> None:
    stream = SampleStream([137], np.array([1.0]), seed=3)
    dataset, sample = stream[np.arange(BLOCK * 2)]
    assert (dataset == 0).all()
    counts = np.bincount(sample, minlength=137)
    assert counts.max() - counts.min() <= 1


def test_epochs_differ() -> None:
    stream = SampleStream([BLOCK], np.array([1.0]), seed=3)
    first, second = stream[np.arange(BLOCK)][1], stream[np.arange(BLOCK, 2 * BLOCK)][1]
    assert np.array_equal(np.sort(first), np.sort(second))
    assert (first == second).mean() < 0.001


def test_shares_are_exact_and_spread_evenly() -> None:
    shares = np.array([0.35, 0.18, 0.12, 0.04, 0.31])
    stream = SampleStream([1000, 70, 5000, 3, 40], shares, seed=0)
    dataset, sample = stream[np.arange(100_000)]
    assert np.abs(np.bincount(dataset, minlength=5) / 100_000 - shares).max() < 0.005
    assert all(sample[dataset == d].max() < size for d, size in enumerate([1000, 70, 5000, 3, 40]))
    block = np.bincount(stream[np.arange(BLOCK)][0], minlength=5) / BLOCK
    assert np.abs(block - shares).max() < 1e-4


def test_tiny_weights_still_get_samples() -> None:
    dataset, _ = SampleStream([10, 10], np.array([1 - 1e-9, 1e-9]), seed=0)[np.arange(BLOCK)]
    assert (dataset == 1).sum() == 1


@settings(deadline=None, max_examples=25)
@given(places=st.lists(st.integers(0, 10 * BLOCK), min_size=1, max_size=50), seed=st.integers(0, 99))
def test_a_place_does_not_depend_on_what_is_asked_with_it(places: list[int], seed: int) -> None:
    stream = SampleStream([500, 900], np.array([0.3, 0.7]), seed)
    together = stream[np.array(places)]
    alone = [stream[np.array([place])] for place in places]
    assert together[0].tolist() == [int(dataset[0]) for dataset, _ in alone]
    assert together[1].tolist() == [int(sample[0]) for _, sample in alone]


def test_weighting() -> None:
    weights, sizes = {"a": 1.0, "b": 2.0}, {"a": 300, "b": 50}
    assert mixture_shares(weights, sizes, "per_frame").tolist() == [0.75, 0.25]
    np.testing.assert_allclose(mixture_shares(weights, sizes, "share"), [1 / 3, 2 / 3])
    for wrong in ({}, {"a": 0.0}, {"a": float("nan")}):
        with pytest.raises(ConfigError, match="must be positive"):
            mixture_shares(wrong, sizes, "share")
