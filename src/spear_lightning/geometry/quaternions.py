"""Unit quaternions: the one place that states the package's convention.

A quaternion is a tensor (..., 4) holding x, y, z, w (the scalar LAST, as roma and scipy have it) of unit
norm. It acts as the rotation v -> q v q*, and `multiply(a, b)` is "first b, then a". q and -q are one
rotation; stored data has w >= 0 (`canonicalize`). Angles are in radians. The unit quaternions are the sphere
S3 in R4, and a tangent vector at q is a 4-vector orthogonal to q (spec section 8).

Leading dimensions broadcast, the dtype is kept, and everything is differentiable with finite gradients. Where
two quaternions are compared, the arithmetic uses their sum and difference, which floating point
computes almost without error where they are nearly equal or nearly opposite. arccos is never used: its
derivative is infinite at 1.

roma is imported where it is called: it brings torch's compiler with it, which takes longer to import than all that
most processes need (simulators, indexers, the command line's answers).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from spear_lightning.errors import DataError

SERIES_BELOW = 1e-3
"""Squared angles below this take a power series; its first neglected term is under 1e-17."""


def canonicalize(q: Tensor) -> Tensor:
    """Return q or -q, whichever has w >= 0; at w = 0 the first nonzero of x, y, z is made positive.

    Args:
        q: (..., 4) quaternions.
    """
    x, y, z, w = q.sign().unbind(-1)
    # The first nonzero sign in the order w, x, y, z outweighs all later ones together.
    leading = 8 * w + 4 * x + 2 * y + z
    return torch.where((leading < 0).unsqueeze(-1), -q, q)


def normalize(q: Tensor) -> Tensor:
    """Scale (..., 4) vectors to unit norm; a zero vector becomes the identity rotation, gradient zero."""
    norm = torch.linalg.vector_norm(q, dim=-1, keepdim=True)
    degenerate = norm <= torch.finfo(q.dtype).tiny
    identity = torch.zeros_like(q)
    identity[..., 3].fill_(1.0)
    return torch.where(degenerate, identity, q / torch.where(degenerate, torch.ones_like(norm), norm))


def multiply(a: Tensor, b: Tensor) -> Tensor:
    """Return the Hamilton product a b, the rotation "first b, then a"; shapes (..., 4) broadcast."""
    import roma

    return roma.quat_product(a, b)


def conjugate(q: Tensor) -> Tensor:
    """Return the conjugate, which is the inverse rotation; (..., 4)."""
    import roma

    return roma.quat_conjugation(q)


def rotate(q: Tensor, v: Tensor) -> Tensor:
    """Rotate vectors v (..., 3) by unit quaternions q (..., 4); leading dimensions broadcast."""
    import roma

    leading = torch.broadcast_shapes(q.shape[:-1], v.shape[:-1])
    return roma.quat_action(q.expand(*leading, 4), v.expand(*leading, 3), is_normalized=True)


def project_tangent(q: Tensor, v: Tensor) -> Tensor:
    """Return v - <q, v> q, the part of the 4-vectors v that is tangent to the sphere at q; (..., 4)."""
    return v - (q * v).sum(-1, keepdim=True) * q


class _Arc(NamedTuple):
    """The great arc between two quaternions; all (..., 4) or (..., 1).

    Attributes:
        middle: Unit vector to the middle of the arc.
        chord: q1 - q0 made orthogonal to `middle`.
        length: Length of the chord, 2 sin(angle / 2).
        angle: Angle of the arc in [0, pi].
    """

    middle: Tensor
    chord: Tensor
    length: Tensor
    angle: Tensor


def _sum_and_chord(q0: Tensor, q1: Tensor) -> tuple[Tensor, Tensor]:
    # For unit quaternions the two are orthogonal, of lengths 2 cos(angle/2) and 2 sin(angle/2). Rounded
    # quaternions are not quite of unit norm, which would tilt the shorter of the two by a large angle when it is
    # tiny. One step of mutual orthogonalisation mends that, and hardly touches the longer one.
    total, chord = q0 + q1, q1 - q0
    overlap = (total * chord).sum(-1, keepdim=True) / 4
    return total - overlap * chord, chord - overlap * total


def _arc(q0: Tensor, q1: Tensor) -> _Arc:
    total, chord = _sum_and_chord(q0, q1)
    # vector_norm's gradient at zero is zero, so nothing here becomes NaN at q0 == q1 or q0 == -q1.
    reach = torch.linalg.vector_norm(total, dim=-1, keepdim=True)
    length = torch.linalg.vector_norm(chord, dim=-1, keepdim=True)
    # Between exactly opposite quaternions every great arc is shortest; this takes the one through
    # q times the unit x, which is orthogonal to q for every q. There the chord is -2 q.
    x, y, z, w = chord.unbind(-1)
    sideways = torch.stack([w, z, -y, -x], dim=-1) / 2
    middle = torch.where(reach == 0, sideways, total / _nonzero(reach))
    return _Arc(middle, chord, length, 2 * torch.atan2(length, reach))


def _nonzero(x: Tensor) -> Tensor:
    # Divisors of a branch that `where` discards must not be zero either, or its gradient is NaN.
    return x.masked_fill(x == 0, 1.0)


def _offset(t: Tensor | float, like: Tensor) -> Tensor:
    # Position on the arc relative to its middle, in units of the arc's length: -1/2 at q0, 1/2 at q1.
    return torch.as_tensor(t, dtype=like.dtype, device=like.device).unsqueeze(-1) - 0.5


def slerp(q0: Tensor, q1: Tensor, t: Tensor | float) -> Tensor:
    """Interpolate along the great arc from q0 to q1, WITHOUT flipping a sign: the caller chooses it.

    Stable for every angle from 0 to pi in float32. Between exactly opposite quaternions an arbitrary but
    fixed one of the shortest arcs is taken.

    Args:
        q0: (..., 4) unit quaternions at t = 0.
        q1: (..., 4) unit quaternions at t = 1.
        t: (...) positions on the arc; without the trailing dimension.

    Returns:
        (..., 4) unit quaternions.
    """
    arc = _arc(q0, q1)
    s = _offset(t, q0)
    turned = s * arc.angle
    # sin(s angle) / (2 sin(angle / 2)), whose limit for equal quaternions is s.
    along = torch.where(arc.length == 0, s, torch.sin(turned) / _nonzero(arc.length))
    return torch.cos(turned) * arc.middle + along * arc.chord


def slerp_velocity(q0: Tensor, q1: Tensor, t: Tensor | float) -> Tensor:
    """Return d/dt slerp(q0, q1, t): a tangent vector at slerp(q0, q1, t) of constant norm, the arc's angle.

    It equals angle / sin(angle) (-cos((1 - t) angle) q0 + cos(t angle) q1) (spec section 8), written so that
    it is stable for every angle from 0 to pi.

    Args:
        q0: (..., 4) unit quaternions at t = 0.
        q1: (..., 4) unit quaternions at t = 1.
        t: (...) positions on the arc; without the trailing dimension.

    Returns:
        (..., 4) tangent vectors, radians (on the sphere) per unit of t.
    """
    arc = _arc(q0, q1)
    s = _offset(t, q0)
    turned = s * arc.angle
    # angle / (2 sin(angle / 2)), whose limit for equal quaternions is 1.
    speed = (arc.angle / _nonzero(arc.length)).masked_fill(arc.length == 0, 1.0)
    return torch.cos(turned) * speed * arc.chord - torch.sin(turned) * arc.angle * arc.middle


def exp(q: Tensor, v: Tensor) -> Tensor:
    """Exponential map of the sphere: walk from q along the tangent vector v.

    Args:
        q: (..., 4) unit quaternions.
        v: (..., 4) tangent vectors at q (see `project_tangent`); their norm is the angle walked on the
            sphere, half the angle of the rotation.

    Returns:
        (..., 4) unit quaternions cos|v| q + sin|v| / |v| v.
    """
    square = (v * v).sum(-1, keepdim=True)
    small = square < SERIES_BELOW
    angle = torch.where(small, torch.ones_like(square), square).sqrt()
    cos_series = 1 - square / 2 * (1 - square / 12 * (1 - square / 30 * (1 - square / 56)))
    sinc_series = 1 - square / 6 * (1 - square / 20 * (1 - square / 42))
    cosine = torch.where(small, cos_series, torch.cos(angle))
    sinc = torch.where(small, sinc_series, torch.sin(angle) / angle)
    return cosine * q + sinc * v


def log(q0: Tensor, q1: Tensor) -> Tensor:
    """Return the tangent vectors (..., 4) at q0 that `exp` walks to q1: its inverse for norms below pi."""
    return slerp_velocity(q0, q1, 0.0)


def sphere_angle(q0: Tensor, q1: Tensor) -> Tensor:
    """Return the angle between quaternions as points of the sphere, 2 atan2(|q0 - q1|, |q0 + q1|).

    Args:
        q0: (..., 4) unit quaternions.
        q1: (..., 4) unit quaternions.

    Returns:
        (...) angles in [0, pi]; q and -q are pi apart. The gradient at angles 0 and pi is taken as zero.
    """
    total, chord = _sum_and_chord(q0, q1)
    cosine, sine = (torch.linalg.vector_norm(part, dim=-1) for part in (total, chord))
    return 2 * torch.atan2(sine, cosine)


def rotation_angle(q0: Tensor, q1: Tensor) -> Tensor:
    """Return the angle of the rotation between two rotations, whatever the signs of their quaternions.

    Args:
        q0: (..., 4) unit quaternions.
        q1: (..., 4) unit quaternions.

    Returns:
        (...) angles in [0, pi] radians. The gradient at angle 0 is taken as zero.
    """
    total, chord = _sum_and_chord(q0, q1)
    cosine, sine = (torch.linalg.vector_norm(part, dim=-1) for part in (total, chord))
    return 4 * torch.atan2(torch.minimum(sine, cosine), torch.maximum(sine, cosine))


def random_unit(
    shape: tuple[int, ...],
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    half_space: bool = False,
) -> Tensor:
    """Draw unit quaternions uniformly from the sphere, which makes the rotations uniform too.

    Args:
        shape: Leading dimensions.
        generator: Source of randomness, on `device`.
        device: Where the result is needed.
        dtype: Floating-point type.
        half_space: Whether to draw from the half with w >= 0 alone.

    Returns:
        (*shape, 4) unit quaternions.
    """
    q = normalize(torch.randn((*shape, 4), generator=generator, device=device, dtype=dtype))
    return canonicalize(q) if half_space else q


def from_euler_xyz_extrinsic(rpy: Tensor) -> Tensor:
    """Convert roll, pitch, yaw about fixed axes, R = Rz(yaw) Ry(pitch) Rx(roll): scipy's lower-case "xyz".

    Args:
        rpy: (..., 3) angles in radians.

    Returns:
        (..., 4) unit quaternions of either sign.
    """
    import roma

    return roma.euler_to_unitquat("xyz", rpy)


def to_euler_xyz_extrinsic(q: Tensor) -> Tensor:
    """Convert to roll, pitch, yaw (see `from_euler_xyz_extrinsic`).

    Args:
        q: (..., 4) unit quaternions.

    Returns:
        (..., 3) radians: roll and yaw in [-pi, pi], pitch in [-pi/2, pi/2]. At pitch +-pi/2 only roll -+ yaw
        is defined; one of the two is set to zero there, and gradients are undefined.
    """
    import roma

    return roma.unitquat_to_euler("xyz", q)


def from_rotvec(rotvec: Tensor) -> Tensor:
    """Convert rotation vectors (..., 3), axis times angle in radians, to unit quaternions (..., 4)."""
    import roma

    return roma.rotvec_to_unitquat(rotvec)


def to_rotvec(q: Tensor) -> Tensor:
    """Convert unit quaternions (..., 4) to the shortest rotation vectors (..., 3), norms in [0, pi]."""
    import roma

    return roma.unitquat_to_rotvec(q)


def from_matrix(matrix: Tensor) -> Tensor:
    """Convert rotation matrices (..., 3, 3) to unit quaternions (..., 4), w >= 0."""
    import roma

    return canonicalize(roma.rotmat_to_unitquat(matrix))


def to_matrix(q: Tensor) -> Tensor:
    """Convert unit quaternions (..., 4) to rotation matrices (..., 3, 3)."""
    import roma

    return roma.unitquat_to_rotmat(q)


def from_matrix_colmajor(flat: Tensor) -> tuple[Tensor, Tensor]:
    """Split homogeneous 4x4 transforms that are stored column by column, as several OXE datasets do.

    Args:
        flat: (..., 16) the matrices' columns one after another, so that the translation is at 12:15.

    Returns:
        The rotation as quaternions (..., 4), w >= 0, and the translation (..., 3).

    Raises:
        DataError: If the last row of a matrix is not 0 0 0 1, as in matrices stored row by row.
    """
    matrix = flat.unflatten(-1, (4, 4)).transpose(-1, -2)
    bottom = matrix[..., 3, :]
    deviation = (bottom - bottom.new_tensor([0.0, 0.0, 0.0, 1.0])).abs().amax(-1).flatten()
    # Written so that NaN counts as broken.
    broken = ~(deviation <= 1e-4)
    if bool(broken.any()):
        raise DataError(
            "The numbers are no 4x4 transforms stored column by column",
            where="from_matrix_colmajor",
            found=f"a matrix whose last row is {bottom.reshape(-1, 4)[broken][0].tolist()}",
            expected="[0, 0, 0, 1]",
            remedy="check which columns of the state hold the transform, and whether it is stored row by row",
        )
    return from_matrix(matrix[..., :3, :3]), matrix[..., :3, 3]


def from_wxyz(q: Tensor) -> Tensor:
    """Reorder quaternions (..., 4) from w, x, y, z (MuJoCo, pytorch3d, SAPIEN) to x, y, z, w."""
    return q.roll(-1, dims=-1)


def to_wxyz(q: Tensor) -> Tensor:
    """Reorder quaternions (..., 4) from x, y, z, w to w, x, y, z (MuJoCo, pytorch3d, SAPIEN)."""
    return q.roll(1, dims=-1)
