"""Oriented 3D boxes in the camera frame, and the canonical order of their axes and vertices.

A box frame is ambiguous up to the 24 rotations that map axes onto axes: the same box can be written with any of
them, and a network that shall name its vertices one by one would be taught noise. The canonical frame depends only
on how the box lies with respect to the camera (OpenCV: x right, y down, z forward), never on its extents:

- y is the box axis closest to `DOWN`, the direction of gravity for a camera that looks 40 degrees down;
- x is that of the other two which lies more along the image's horizontal, and points right;
- z = x cross y points away from the camera.

So a box that stands on a table has y down through the table, x to the right along it and z away along it. Vertex k
has the signs of its bits: bit 0 is x (left 0, right 1), bit 1 is y (top 0, bottom 1), bit 2 is z (near 0, far 1).
Mirroring the image (x -> -x) exchanges vertices k and k ^ 1 and changes nothing else.

Where it jumps. No rule can be continuous for all orientations, since turning a box by 90 degrees brings it back
to itself with other names. This one jumps (1) where two of the horizontal axes are equally horizontal in the
image, which for a standing box is a yaw of 45 degrees, and (2) where two axes are equally close to `DOWN`, which
a standing box meets only if the camera's pitch is outside -5 to 85 degrees (at roll 0). One tie every 90 degrees
of yaw is the least that any rule can have. The reference is tilted because the untilted one (the camera's own
axes) would jump at a pitch of 45 degrees, where robot cameras are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from spear_lightning.errors import ShapeError
from spear_lightning.geometry import quaternions

REFERENCE_PITCH = math.radians(40)
"""How far down the camera of the canonical order looks, radians; the middle of the pitches that are met."""

DOWN = (0.0, math.cos(REFERENCE_PITCH), math.sin(REFERENCE_PITCH))
"""Direction of gravity in the frame of that camera (unit vector)."""

VERTEX_SIGNS = tuple((2.0 * (k & 1) - 1, 2.0 * (k >> 1 & 1) - 1, 2.0 * (k >> 2 & 1) - 1) for k in range(8))
"""Signs of (x, y, z) of vertex k in the box frame."""

MIRRORED_VERTEX = tuple(k ^ 1 for k in range(8))
"""Where vertex k of a box is found in the canonical order after x -> -x."""


@dataclass(frozen=True)
class OrientedBox:
    """One box or a batch of boxes in the OpenCV camera frame.

    Attributes:
        centre: (..., 3) centre; metres or scene units, as the owner states.
        quaternion: (..., 4) unit quaternion xyzw that rotates box axes into the camera frame.
        extents: (..., 3) full edge lengths along the box's x, y, z axes, in the unit of `centre`; >= 0.
    """

    centre: Tensor
    quaternion: Tensor
    extents: Tensor

    def __post_init__(self) -> None:
        leading = self.centre.shape[:-1]
        found = tuple(tuple(part.shape) for part in (self.centre, self.quaternion, self.extents))
        if found != ((*leading, 3), (*leading, 4), (*leading, 3)):
            raise ShapeError(
                "A box is a centre, a quaternion and three extents",
                where="OrientedBox",
                found=found,
                expected="(..., 3), (..., 4), (..., 3) with equal leading dimensions",
            )

    @property
    def axes(self) -> Tensor:
        """Rotation matrices (..., 3, 3); column i is the box's axis i in the camera frame."""
        return quaternions.to_matrix(self.quaternion)

    @property
    def volume(self) -> Tensor:
        """Volumes (...)."""
        return self.extents.prod(-1)

    def vertices(self) -> Tensor:
        """Return the vertices (..., 8, 3) in the order of `VERTEX_SIGNS`; canonical if the box is."""
        signs = self.centre.new_tensor(VERTEX_SIGNS)
        local = signs * self.extents.unsqueeze(-2) / 2
        return self.centre.unsqueeze(-2) + local @ self.axes.transpose(-1, -2)

    def canonical(self) -> OrientedBox:
        """Return the same box with its axes in the canonical order (see the module); w >= 0."""
        axes = self.axes
        order, signs = _canonical_axes(axes)
        ordered = _ordered(axes, order, signs)
        return OrientedBox(self.centre, quaternions.from_matrix(ordered), self.extents.gather(-1, order))

    def mirrored(self) -> OrientedBox:
        """Return the box seen in the image flipped left to right, x -> -x; canonical if the box is."""
        # The mirror image of a frame is left-handed; negating x again makes it right-handed: M R M.
        x, y, z, w = self.quaternion.unbind(-1)
        centre = self.centre * self.centre.new_tensor([-1.0, 1.0, 1.0])
        return OrientedBox(centre, torch.stack([x, -y, -z, w], dim=-1), self.extents)

    def contains(self, points: Tensor, margin: float = 0.0) -> Tensor:
        """Return which points (..., N, 3) lie inside the boxes grown by `margin` on every side; (..., N)."""
        local = (points - self.centre.unsqueeze(-2)) @ self.axes
        return (local.abs() <= self.extents.unsqueeze(-2) / 2 + margin).all(-1)


def canonical_axes(axes: Tensor) -> Tensor:
    """Reorder and sign the columns of rotation matrices (..., 3, 3) canonically (see the module)."""
    return _ordered(axes, *_canonical_axes(axes))


def reference_axes(like: Tensor) -> Tensor:
    """Return the canonical frame (3, 3) of a box that the reference camera sees straight: columns x, DOWN, z."""
    down = like.new_tensor(DOWN)
    right = like.new_tensor([1.0, 0.0, 0.0])
    return torch.stack([right, down, torch.linalg.cross(right, down)], dim=-1)


def _canonical_axes(axes: Tensor) -> tuple[Tensor, Tensor]:
    """Return which old axis becomes x, y, z, int64 (..., 3), and with which sign (..., 3)."""
    downness = (axes * axes.new_tensor(DOWN).unsqueeze(-1)).sum(-2)
    rightness = axes[..., 0, :]
    y = downness.abs().argmax(-1, keepdim=True)
    # Components are at most 1 in magnitude: the axis taken for y cannot win again.
    x = rightness.abs().scatter(-1, y, -1.0).argmax(-1, keepdim=True)
    z = 3 - x - y
    sign_x, sign_y = rightness.gather(-1, x).sign(), downness.gather(-1, y).sign()
    # x cross y is old axis z if (x, y, z) is an even permutation, else its negative.
    even = (y - x) % 3 == 1
    sign_z = sign_x * sign_y * torch.where(even, 1.0, -1.0).to(axes.dtype)
    return torch.cat([x, y, z], dim=-1), torch.cat([sign_x, sign_y, sign_z], dim=-1)


def _ordered(axes: Tensor, order: Tensor, signs: Tensor) -> Tensor:
    return axes.gather(-1, order.unsqueeze(-2).expand(axes.shape)) * signs.unsqueeze(-2)


def box_from_vertices(vertices: Tensor) -> tuple[OrientedBox, Tensor]:
    """Return the boxes that eight vertices in the order of `VERTEX_SIGNS` describe, which need not be exact.

    The edges of each direction are averaged, and the three averages made orthogonal by the polar decomposition
    (the nearest rotation).

    Args:
        vertices: (..., 8, 3) vertices, for example read from quantised tokens.

    Returns:
        The boxes, with extents >= 0, and (...) the root mean square distance of the given vertices from theirs.
    """
    signs = vertices.new_tensor(VERTEX_SIGNS)
    centre = vertices.mean(-2)
    edges = vertices.transpose(-1, -2) @ signs / 4
    left, _, right = torch.linalg.svd(edges)
    # A set of vertices may be mirrored (a wrong answer): the nearest proper rotation negates the last direction.
    proper = torch.linalg.det(left @ right).sign()
    left = left * torch.stack([torch.ones_like(proper), torch.ones_like(proper), proper], dim=-1).unsqueeze(-2)
    axes = left @ right
    extents = (axes * edges).sum(-2).clamp(min=0)
    box = OrientedBox(centre, quaternions.from_matrix(axes), extents)
    residual = (box.vertices() - vertices).square().sum(-1).mean(-1).sqrt()
    return box, residual
