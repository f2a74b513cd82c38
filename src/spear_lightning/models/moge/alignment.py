"""The best scale and shift between predicted and true points, and points after it.

MoGe's objective compares points after the alignment that makes them agree best, so that a network need not guess
what an image does not tell. Legend: B images, N points, K anchors.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

TINY = 1e-9
"""Weights and coefficients below this are zero."""


class Alignment(NamedTuple):
    """What makes predicted points (x, y, z) true ones: scale (x, y, z) + (0, 0, shift); (B,) each, scale > 0."""

    scale: Tensor
    shift: Tensor

    def apply(self, points: Tensor) -> Tensor:
        """Return aligned points (B, ..., 3)."""
        shape = (-1, *(1,) * (points.ndim - 1))
        shift = torch.stack([torch.zeros_like(self.shift)] * 2 + [self.shift], dim=-1)
        return self.scale.view(shape) * points + shift.view(-1, *(1,) * (points.ndim - 2), 3)


@torch.no_grad()
def align(predicted_BN3: Tensor, true_BN3: Tensor, weight_BN: Tensor) -> Alignment:
    """Find the scale and the shift along z with the least weighted sum of absolute differences, exactly.

    At the best shift one point's z agrees (a weighted median), so each point in turn is taken as the anchor whose
    z agrees; what is left is a weighted median over the scale (as MoGe's solver does it). The work grows as
    N^2 log N: a few hundred points do.

    Args:
        predicted_BN3: Predicted points.
        true_BN3: True points, any numbers where the weight is 0.
        weight_BN: Weights >= 0.

    Returns:
        The alignment, without gradient: at the optimum it does not change the loss's gradient. Images without
        weight get scale 1 and shift 0.
    """
    weight = weight_BN.float()
    counted = (weight > TINY)[..., None]
    predicted, true = (torch.where(counted, points.float(), 0.0) for points in (predicted_BN3, true_BN3))
    # Predictions may be of any size, and what counts as zero must not depend on it.
    size_B = _typical(predicted, weight) / _typical(true, weight)
    predicted = predicted / size_B[:, None, None]
    # (B, K, 3N) coefficients and right sides: x and y are the same for all anchors.
    across, across_true = predicted[..., :2].flatten(1), true[..., :2].flatten(1)
    z, z_true = predicted[..., 2], true[..., 2]
    anchors = z.shape[1]
    a = torch.cat([across[:, None].expand(-1, anchors, -1), z[:, None] - z[:, :, None]], dim=-1)
    b = torch.cat([across_true[:, None].expand(-1, anchors, -1), z_true[:, None] - z_true[:, :, None]], dim=-1)
    w = torch.cat([weight.repeat_interleave(2, dim=1), weight], dim=-1)[:, None]
    scale_BK = _weighted_median(
        b / torch.where(a.abs() > TINY, a, 1.0), w * torch.where(a.abs() > TINY, a.abs(), 0)
    )
    error_BK = (w * (scale_BK[..., None] * a - b).abs()).sum(-1)
    error_BK = torch.where((weight > TINY) & (scale_BK > 0), error_BK, torch.inf)
    best = error_BK.argmin(-1, keepdim=True)
    scale = scale_BK.gather(1, best)
    shift = z_true.gather(1, best) - scale * z.gather(1, best)
    # Points that are mirrored, say, have no good scale > 0: they are brought to the right size.
    found = error_BK.gather(1, best).isfinite()
    scale, shift = torch.where(found, scale, 1.0)[:, 0], torch.where(found, shift, 0.0)[:, 0]
    return Alignment(scale / size_B, shift)


def _typical(points_BN3: Tensor, weight_BN: Tensor) -> Tensor:
    size_B = (weight_BN[..., None] * points_BN3.abs()).sum((1, 2)) / weight_BN.sum(1).clamp(min=TINY)
    return torch.where(size_B > 0, size_B, 1.0)


def _weighted_median(values: Tensor, weights: Tensor) -> Tensor:
    order = values.argsort(dim=-1)
    total = weights.gather(-1, order).cumsum(-1)
    middle = torch.searchsorted(total, total[..., -1:] / 2).clamp(max=values.shape[-1] - 1)
    return values.gather(-1, order.gather(-1, middle))[..., 0]
