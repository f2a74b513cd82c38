"""New rows that are drawn together keep each row's distribution, and are as alike as their bins are near."""

from __future__ import annotations

import pytest
import torch

from spear_lightning.models.coordinate_rows import correlate_rows, kernel


@pytest.mark.parametrize("bins", [16, 1024])
def test_one_length_is_a_squared_exponential(bins: int) -> None:
    # A reach of one bin leaves the shortest length alone.
    found = kernel(bins, 1 / bins)
    torch.testing.assert_close(found[3, :6], torch.exp(-torch.tensor([9.0, 4, 1, 0, 1, 4]).double() / 2))


def test_rows_keep_mean_and_spread_and_become_like_their_neighbours() -> None:
    torch.manual_seed(0)
    columns, spread, mean = 10_000, 0.3, 2.0
    rows = mean + spread * torch.randn(64, columns)
    correlate_rows(rows, 0.25)
    torch.testing.assert_close(rows.mean(1), torch.full((64,), mean), atol=0.02, rtol=0)
    torch.testing.assert_close(rows.std(1), torch.full((64,), spread), atol=0.01, rtol=0)
    alike = torch.corrcoef(rows)[32]
    assert alike[[31, 33]].min() > 0.75
    assert (alike[32:48].diff() < 0).all()
    assert alike[[0, 63]].abs().max() < 0.4


def test_the_meta_device_has_nothing_to_correlate() -> None:
    rows = torch.empty(8, 4, device="meta")
    correlate_rows(rows, 0.5)
    assert rows.shape == (8, 4)
