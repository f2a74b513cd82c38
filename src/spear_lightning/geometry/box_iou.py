"""Exact volume of the intersection of oriented boxes, and their intersection over union; vectorised over pairs.

The intersection of two boxes is a polytope of at most 12 faces. By the divergence theorem its volume is a third
of the sum over faces of (distance of the face's plane from the origin) x (area of the face), the area of a face
half the sum over its edges of (distance of the edge's line from the foot of the origin) x (length of the edge),
and an edge is the line of two planes cut by the ten other half-spaces (Lasserre, "An analytical expression and
an algorithm for the volume of a convex polyhedron in R^n", 1983). So there is nothing to build and nothing to
sort.

Legend: N pairs, F faces of the polytope (12), E planes that cut a face's edges (12), K half-spaces (12).
"""

from __future__ import annotations

import torch
from torch import Tensor

from spear_lightning.geometry import quaternions
from spear_lightning.geometry.oriented_boxes import OrientedBox

PARALLEL_BELOW = 1e-10
"""Planes whose normals have a smaller sine have no common edge."""

GROWTH = 3.7e-9
"""The second box grows by this share of the pair's size, so that no two faces coincide."""

CHUNK = 1024
"""Pairs computed at a time: about 100 MB."""


def intersection_volume(first: OrientedBox, second: OrientedBox) -> Tensor:
    """Return the volumes common to pairs of boxes.

    Args:
        first: N boxes: centre (N, 3).
        second: N boxes.

    Returns:
        float64 (N,), in the cube of the boxes' unit; relative error about 1e-8.
    """
    parts = [
        _intersection(_take(first, rows), _take(second, rows))
        for rows in torch.arange(first.centre.shape[0]).split(CHUNK)
    ]
    return torch.cat(parts) if parts else first.centre.new_zeros(0, dtype=torch.float64)


def box_iou(first: OrientedBox, second: OrientedBox) -> Tensor:
    """Return the intersection over union of pairs of boxes, whatever their rotations.

    Args:
        first: N boxes: centre (N, 3).
        second: N boxes.

    Returns:
        float64 (N,) in [0, 1]; 0 for pairs of which a box has no volume.
    """
    common = intersection_volume(first, second)
    volumes = [box.volume.to(common.dtype) for box in (first, second)]
    union = volumes[0] + volumes[1] - common
    solid = torch.minimum(*volumes) > 0
    return torch.where(solid, common / torch.where(solid, union, torch.ones_like(union)), 0.0).clamp(0, 1)


def _take(box: OrientedBox, rows: Tensor) -> OrientedBox:
    centre, quaternion, extents = (
        part[rows.to(part.device)].to(torch.float64) for part in (box.centre, box.quaternion, box.extents)
    )
    # Quaternions that were stored in float32 are of unit norm to seven digits only. Their matrices would not be
    # orthogonal, and then the angles between nearly parallel faces are wrong.
    return OrientedBox(centre, quaternions.normalize(quaternion), extents)


def _planes(box: OrientedBox) -> tuple[Tensor, Tensor]:
    """Return outward normals (N, 6, 3) and distances from the origin (N, 6): inside is normal . p <= distance."""
    normals = box.axes.transpose(-1, -2)
    middle = (normals * box.centre.unsqueeze(-2)).sum(-1)
    half = box.extents / 2
    return torch.cat([normals, -normals], dim=-2), torch.cat([half + middle, half - middle], dim=-1)


def _intersection(first: OrientedBox, second: OrientedBox) -> Tensor:
    # In units of the pair's size, with the origin at the first box's centre.
    size = torch.maximum(first.extents.amax(-1), second.extents.amax(-1)).clamp(min=1e-30).unsqueeze(-1)
    one = OrientedBox(torch.zeros_like(first.centre), first.quaternion, first.extents / size)
    grown = second.extents / size + GROWTH
    two = OrientedBox((second.centre - first.centre) / size, second.quaternion, grown)
    normals_a, distance_a = _planes(one)
    normals_b, distance_b = _planes(two)
    normal_NF3 = torch.cat([normals_a, normals_b], dim=-2)
    distance_NF = torch.cat([distance_a, distance_b], dim=-1)
    lengths_NFE, offset_NFE = _edges(normal_NF3, distance_NF)
    area_NF = (lengths_NFE * offset_NFE).sum(-1) / 2
    volume = (distance_NF * area_NF).sum(-1) / 3
    return volume.clamp(min=0) * size.squeeze(-1) ** 3


def _edges(normal_NF3: Tensor, distance_NF: Tensor) -> tuple[Tensor, Tensor]:
    """Return, for ordered pairs of planes, the length of their edge and its distance in the first plane."""
    count = normal_NF3.shape[-2]
    face, other = normal_NF3.unsqueeze(-2), normal_NF3.unsqueeze(-3)
    d_face, d_other = distance_NF.unsqueeze(-1), distance_NF.unsqueeze(-2)
    along = torch.linalg.cross(face.expand(-1, -1, count, -1), other.expand(-1, count, -1, -1))
    sine = torch.linalg.vector_norm(along, dim=-1)
    crossing = sine > PARALLEL_BELOW
    safe = torch.where(crossing, sine, 1.0)
    along = along / safe.unsqueeze(-1)
    # The point of the line nearest to the origin.
    point = d_face.unsqueeze(-1) * torch.linalg.cross(other.expand_as(along), along)
    point = (point + d_other.unsqueeze(-1) * torch.linalg.cross(along, face.expand_as(along))) / safe.unsqueeze(-1)
    # Each half-space k allows the line's parameter t where slope t <= room.
    slope = torch.einsum("nfei,nki->nfek", along, normal_NF3)
    room = distance_NF[:, None, None] - torch.einsum("nfei,nki->nfek", point, normal_NF3)
    same = torch.eye(count, dtype=torch.bool, device=sine.device)
    own = same.unsqueeze(1) | same.unsqueeze(0)
    bound = room / slope
    flat = (slope.abs() < PARALLEL_BELOW) | own
    upper = bound.masked_fill(flat | (slope < 0), torch.inf).amin(-1)
    lower = bound.masked_fill(flat | (slope > 0), -torch.inf).amax(-1)
    outside = (flat & ~own & (room < 0)).any(-1)
    length = (upper - lower).clamp(min=0)
    length = torch.where(crossing & ~outside & length.isfinite(), length, 0.0)
    cosine = (face * other).sum(-1)
    return length, (d_other - cosine * d_face) / safe
