"""From MoGe's affine-invariant points to a camera: which shift along z and which focal length explain the pixels.

MoGe's points (x, y, z) are those of a pinhole camera up to a scale and a shift s along z, so that pixels are at
f (x, y) / (z + s). Given s, the best f has a closed form; what is left is a search along one line, done here by
Gauss-Newton steps for all images at once (the published code calls a solver image by image on the CPU). Lengths on
the view plane are in half diagonals of the image (`blocks.view_plane`).

Legend: B images, N points of each.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from spear_lightning.models.moge.blocks import view_plane

SAMPLED_SIDE = 64
"""Points are taken from a grid of this side."""

STEPS = 12
"""Gauss-Newton steps; each halves itself up to three times where the error would grow."""

SHRINK = (1.0, 0.5, 0.25, 0.125, 0.0)

CLOSEST = 1e-4
"""Least depth of a point after the shift, as a share of the spread of depths."""


class Camera(NamedTuple):
    """Shift and focal length of each image.

    Attributes:
        shift: float32 (B,), to be added to z, in the unit of the points.
        focal: float32 (B,), half diagonals of the image.
        found: bool (B,); where False, there were too few points or none of it made sense: shift 0, focal 1.
    """

    shift: Tensor
    focal: Tensor
    found: Tensor


def recover_camera(points_BHW3: Tensor, mask_BHW: Tensor, focal_B: Tensor | None = None) -> Camera:
    """Find the shift, and the focal length where it is not known, of affine-invariant point maps.

    Args:
        points_BHW3: Points (B, H, W, 3) of square pixels, known up to scale and a shift along z.
        mask_BHW: bool, the points that count.
        focal_B: Known focal lengths in half diagonals; NaN: not known. Default: none is known.
    """
    height, width = mask_BHW.shape[1:]
    rows, columns = (_nearest(size, mask_BHW.device) for size in (height, width))
    plane_HW2 = view_plane(height, width, width / height, points_BHW3.new_zeros((), dtype=torch.float64))
    target_N2 = plane_HW2.permute(1, 2, 0)[rows][:, columns].flatten(0, 1)
    points_BN3 = points_BHW3[:, rows][:, :, columns].flatten(1, 2).double()
    weight_BN = mask_BHW[:, rows][:, :, columns].flatten(1).double()
    weight_BN = weight_BN * points_BN3.isfinite().all(-1)
    points_BN3 = points_BN3.nan_to_num(0, 0, 0)
    known_B = torch.full_like(weight_BN[:, 0], torch.nan) if focal_B is None else focal_B.double()
    search = _Search(points_BN3, target_N2, weight_BN, known_B)
    shift_B = search.start()
    for _ in range(STEPS):
        shift_B = search.step(shift_B)
    focal_B = search.focal(shift_B)
    found_B = (weight_BN.sum(-1) >= 2) & shift_B.isfinite() & focal_B.isfinite() & (focal_B > 0)
    return Camera(torch.where(found_B, shift_B, 0.0).float(), torch.where(found_B, focal_B, 1.0).float(), found_B)


def _nearest(size: int, device: torch.device) -> Tensor:
    """Return which rows nearest-neighbour resampling to at most `SAMPLED_SIDE` of them takes."""
    wanted = min(size, SAMPLED_SIDE)
    return (torch.arange(wanted, device=device) * size) // wanted


class _Search:
    """Minimises |f(s) p(s) - target|^2 over s, with p = (x, y) / (z + s); float64.

    Args:
        points_BN3: Points.
        target_N2: Where they are seen on the view plane.
        weight_BN: 1 for the points that count, 0 for others.
        known_B: Known focal lengths, NaN where they are sought.
    """

    def __init__(self, points_BN3: Tensor, target_N2: Tensor, weight_BN: Tensor, known_B: Tensor) -> None:
        self.xy = points_BN3[..., :2] * weight_BN[..., None]
        self.target = target_N2 * weight_BN[..., None]
        # Points that do not count sit at the depth of the others and have no part in any sum.
        count_B = weight_BN.sum(-1).clamp(min=1)
        depth = points_BN3[..., 2]
        mean_B = (depth * weight_BN).sum(-1) / count_B
        self.depth = torch.where(weight_BN > 0, depth, mean_B[:, None])
        self.known = known_B
        spread_B = (self.depth - mean_B[:, None]).abs().amax(-1).clamp(min=1e-12)
        self.lowest = CLOSEST * spread_B - self.depth.amin(-1)

    def start(self) -> Tensor:
        """Return the solution (B,) of the problem multiplied by z + s, f (x, y) = target (z + s): it is linear."""
        target_z = self.target * self.depth[..., None]
        xx, xt, tt = _dot(self.xy, self.xy), _dot(self.xy, self.target), _dot(self.target, self.target)
        xz, tz = _dot(self.xy, target_z), _dot(self.target, target_z)
        sought_B = (xz * xt - tz * xx) / (tt * xx - xt * xt).clamp(min=1e-300)
        given_B = (self.known * xt - tz) / tt.clamp(min=1e-300)
        shift_B = torch.where(self.known.isnan(), sought_B, given_B).nan_to_num(0)
        return torch.maximum(shift_B, self.lowest)

    def focal(self, shift_B: Tensor) -> Tensor:
        """Return the best focal length (B,) for a shift, or the known one; further dimensions may come first."""
        projected = self._projected(shift_B)
        best_B = _dot(projected, self.target) / _dot(projected, projected).clamp(min=1e-300)
        return torch.where(self.known.isnan(), best_B, self.known)

    def step(self, shift_B: Tensor) -> Tensor:
        """Return a shift (B,) with no larger error."""
        projected = self._projected(shift_B)
        slope = -projected / (self.depth + shift_B[:, None])[..., None]
        focal_B = self.focal(shift_B)
        pp = _dot(projected, projected).clamp(min=1e-300)
        # f = p.t / p.p, so f' = (p'.t - 2 f p'.p) / p.p; a known f does not change.
        change_B = (_dot(slope, self.target) - 2 * focal_B * _dot(slope, projected)) / pp
        change_B = torch.where(self.known.isnan(), change_B, 0.0)
        jacobian = change_B[:, None, None] * projected + focal_B[:, None, None] * slope
        residual = focal_B[:, None, None] * projected - self.target
        move_B = -_dot(jacobian, residual) / _dot(jacobian, jacobian).clamp(min=1e-300)
        tries = torch.stack([torch.maximum(shift_B + share * move_B, self.lowest) for share in SHRINK])
        # All at once: the sums are small, and on a GPU their number counts.
        errors = self._error(tries).nan_to_num(torch.inf)
        return tries.gather(0, errors.argmin(0, keepdim=True))[0]

    def _projected(self, shift_B: Tensor) -> Tensor:
        return self.xy / (self.depth + shift_B[..., None])[..., None]

    def _error(self, shift_B: Tensor) -> Tensor:
        residual = self.focal(shift_B)[..., None, None] * self._projected(shift_B) - self.target
        return _dot(residual, residual)


def _dot(first: Tensor, second: Tensor) -> Tensor:
    return (first * second).sum((-1, -2))


def focal_from_widths(focal_x_B: Tensor, aspect: float) -> Tensor:
    """Return focal lengths in half diagonals, given in image widths; `aspect` is width / height."""
    return focal_x_B * (2 * aspect / (1 + aspect**2) ** 0.5)


def normalized_intrinsics(focal_B: Tensor, aspect: float) -> Tensor:
    """Return (B, 4) fx, fy, cx, cy in image widths and heights; square pixels, principal point in the middle.

    Args:
        focal_B: Focal lengths in half diagonals.
        aspect: Width / height of the image.
    """
    fy_B = focal_B / 2 * (1 + aspect**2) ** 0.5
    middle_B = torch.full_like(focal_B, 0.5)
    return torch.stack([fy_B / aspect, fy_B, middle_B, middle_B], dim=-1)


def unproject(depth_BHW: Tensor, intrinsics_B4: Tensor) -> Tensor:
    """Return the points (B, H, W, 3) of depth maps seen by cameras of `normalized_intrinsics`."""
    height, width = depth_BHW.shape[1:]
    u = (torch.arange(width, device=depth_BHW.device) + 0.5) / width
    v = (torch.arange(height, device=depth_BHW.device) + 0.5) / height
    fx, fy, cx, cy = (value[:, None, None] for value in intrinsics_B4.unbind(-1))
    x, y = (u - cx) / fx * depth_BHW, (v[:, None] - cy) / fy * depth_BHW
    return torch.stack([x, y, depth_BHW], dim=-1)


def resized(map_BCHW: Tensor, height: int, width: int) -> Tensor:
    """Return a map at another size, bilinear; in its own type."""
    if map_BCHW.shape[2:] == (height, width):
        return map_BCHW
    return F.interpolate(map_BCHW, (height, width), mode="bilinear", align_corners=False)
