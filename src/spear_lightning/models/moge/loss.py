"""MoGe's training objective: points after the best alignment, normals, edges, mask, and the metric scale.

Legend: B images, H and W the image.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spear_lightning.models.moge.alignment import Alignment, align
from spear_lightning.models.moge.base import Moge, MogeOutput

SMOOTH = 0.05
"""Neighbouring pixels whose depths differ by a larger share lie on different surfaces: they have no normal."""


class GeometryLoss(nn.Module):
    """Weighted sum of the terms of MoGe's objective.

    - `points`: mean |aligned prediction - truth|_1 / z over pixels with a surface;
    - `edges`: the same of the differences between neighbouring pixels, which makes outlines sharp;
    - `normals`: mean 1 - cosine between surface normals, off the outlines;
    - `mask`: the network's own loss of where there is a surface;
    - `scale`: mean absolute error of the logarithm of the metric scale, for networks that have one;
    - `size`: mean square of the mean logarithm of predicted depths. No other term minds the size of predictions,
      so nothing else keeps it from drifting until it is beyond what numbers can hold.

    Args:
        points: Weight of the points.
        edges: Weight of the edges.
        normals: Weight of the normals.
        mask: Weight of the mask.
        scale: Weight of the scale.
        size: Weight of the size.
        align_side: The alignment is found on a grid of this many points along each side.
    """

    def __init__(
        self,
        points: float = 1.0,
        edges: float = 2.0,
        normals: float = 0.05,
        mask: float = 0.3,
        scale: float = 0.1,
        size: float = 0.02,
        align_side: int = 12,
    ) -> None:
        super().__init__()
        self.weights = {
            "points": points,
            "edges": edges,
            "normals": normals,
            "mask": mask,
            "scale": scale,
            "size": size,
        }
        self.align_side = align_side

    def forward(self, moge: Moge, output: MogeOutput, true_BHW3: Tensor, known_BHW: Tensor) -> dict[str, Tensor]:
        """Return the terms without their weights, and `total`.

        Args:
            moge: The network that predicted.
            output: Its prediction.
            true_BHW3: True points in metres; any numbers where nothing is known.
            known_BHW: bool, where there is a surface.
        """
        true_BHW3 = torch.where(known_BHW[..., None], true_BHW3, 1.0)
        alignment = align_maps(output.points, true_BHW3, known_BHW, self.align_side)
        aligned = alignment.apply(output.points)
        losses = {
            "points": _mean((aligned - true_BHW3).abs().sum(-1) / true_BHW3[..., 2], known_BHW),
            "edges": edge_loss(aligned, true_BHW3, known_BHW),
            "normals": normal_loss(aligned, true_BHW3, known_BHW),
            "mask": moge.mask_loss(output.mask, known_BHW),
            "size": size_loss(output.points[..., 2], known_BHW),
        }
        if output.scale is not None:
            losses["scale"] = (output.scale.log() - alignment.scale.log()).abs().mean()
        losses["total"] = sum(
            (self.weights[name] * value for name, value in losses.items()), true_BHW3.new_zeros(())
        )
        return losses


def align_maps(predicted_BHW3: Tensor, true_BHW3: Tensor, known_BHW: Tensor, side: int = 12) -> Alignment:
    """Return the best alignment of point maps (see `alignment.align`), each point weighted by 1 / its true depth.

    Args:
        predicted_BHW3: Predicted points.
        true_BHW3: True ones.
        known_BHW: bool, the points that count.
        side: Points along each side of the grid that is looked at.
    """
    height, width = known_BHW.shape[1:]
    rows = _spread(height, side, known_BHW.device)
    columns = _spread(width, side, known_BHW.device)
    predicted, true = (points[:, rows][:, :, columns].flatten(1, 2) for points in (predicted_BHW3, true_BHW3))
    known = known_BHW[:, rows][:, :, columns].flatten(1)
    weight = torch.where(known, 1 / true[..., 2].clamp(min=1e-6), 0.0)
    return align(predicted, true, weight)


def _spread(size: int, wanted: int, device: torch.device) -> Tensor:
    count = min(size, wanted)
    return (torch.arange(count, device=device) * size + size // 2) // count


def size_loss(depth_BHW: Tensor, known_BHW: Tensor) -> Tensor:
    """Return the mean over images of the squared mean logarithm of depth, over pixels with a surface."""
    logarithm_BHW = torch.where(known_BHW, depth_BHW, 1.0).clamp(min=1e-30).log()
    mean_B = logarithm_BHW.sum((1, 2)) / known_BHW.sum((1, 2)).clamp(min=1)
    return mean_B.square().mean()


def edge_loss(aligned_BHW3: Tensor, true_BHW3: Tensor, known_BHW: Tensor) -> Tensor:
    """Return the mean error of differences between neighbours along both axes, relative to depth."""
    losses = []
    for axis in (1, 2):
        known = _pairs(known_BHW, axis)
        error = (aligned_BHW3.diff(dim=axis) - true_BHW3.diff(dim=axis)).abs().sum(-1)
        size = true_BHW3.shape[axis] - 1
        losses.append(_mean(error / true_BHW3[..., 2].narrow(axis, 0, size), known))
    return (losses[0] + losses[1]) / 2


def normal_loss(aligned_BHW3: Tensor, true_BHW3: Tensor, known_BHW: Tensor) -> Tensor:
    """Return the mean of 1 - cosine between predicted and true surface normals, where there is one surface."""
    depth = true_BHW3[..., 2]
    smooth = [
        _pairs(known_BHW, axis)
        & (depth.diff(dim=axis).abs() < SMOOTH * depth.narrow(axis, 0, depth.shape[axis] - 1))
        for axis in (1, 2)
    ]
    valid = smooth[0][:, :, :-1] & smooth[1][:, :-1]
    cosine = (_normals(aligned_BHW3) * _normals(true_BHW3)).sum(-1)
    return _mean(1 - cosine, valid)


def _normals(points_BHW3: Tensor) -> Tensor:
    down, right = points_BHW3.diff(dim=1)[:, :, :-1], points_BHW3.diff(dim=2)[:, :-1]
    # In units of a pixel's own width: cross products of millimetres would vanish.
    return F.normalize(torch.linalg.cross(F.normalize(down, dim=-1), F.normalize(right, dim=-1)), dim=-1, eps=1e-6)


def _pairs(known_BHW: Tensor, axis: int) -> Tensor:
    size = known_BHW.shape[axis] - 1
    return known_BHW.narrow(axis, 0, size) & known_BHW.narrow(axis, 1, size)


def _mean(values: Tensor, counted: Tensor) -> Tensor:
    return torch.where(counted, values, 0.0).sum() / counted.sum().clamp(min=1)
