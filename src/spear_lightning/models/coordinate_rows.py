"""New embedding rows of 3D tokens that start out like their neighbours: an addition to the paper, off by default.

Rows that are drawn independently tell the network nothing of what 3D tokens are: that bin 511 lies beside bin 512
it has to learn from the data, for each of the 1024 bins, twice (the rows are the output head as well). Here rows
are drawn together, so that each has the distribution it would have alone (spec section 4: mean and covariance of
the base rows), while rows of near bins are alike. It is a Gaussian process along the bins with the mean of squared
exponential kernels of several lengths, so that both "about here" and "exactly here" can be read from a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

_RATIO = 4.0
"""Of one length of the kernel to the next, down to a single bin."""

_JITTER = 1e-6
"""Added to the diagonal: the kernels of long lengths are singular in float64."""


def kernel(bins: int, reach: float) -> Tensor:
    """Return the correlation of rows, float64 (bins, bins), 1 on the diagonal.

    Args:
        bins: How many rows.
        reach: Longest length of the kernel as a share of all bins, in (0, 1].
    """
    place = torch.arange(bins, dtype=torch.float64)
    squares = (place[:, None] - place).square()
    total, lengths, length = torch.zeros_like(squares), 0, bins * reach
    while lengths == 0 or length >= 1:
        total += torch.exp(-squares / (2 * length**2))
        lengths, length = lengths + 1, length / _RATIO
    return total / lengths


@torch.no_grad()
def correlate_rows(weight: Tensor, reach: float) -> None:
    """Make neighbouring rows of a freshly drawn table alike, in place.

    Args:
        weight: (bins, D), rows drawn independently from one distribution; their mean is kept.
        reach: See `kernel`.
    """
    if weight.is_meta:
        return
    correlation = kernel(len(weight), reach) + _JITTER * torch.eye(len(weight), dtype=torch.float64)
    factor = torch.linalg.cholesky(correlation).to(weight.device)
    # Of the rows without their mean, with the variance that taking the mean out costs given back.
    mixing = factor - factor.mean(dim=1, keepdim=True)
    mixing /= mixing.norm(dim=1, keepdim=True)
    weight.copy_(weight.double().mean(0) + mixing @ weight.double())
