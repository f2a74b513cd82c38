"""Baselines that treat rotations as vectors: normalised quaternions and Euler angles (spec section 8).

The paper compares its flow on S3 with these; they share the interface, so that one line of YAML swaps them.
"""

from __future__ import annotations

import math
from abc import abstractmethod

import torch
from torch import Tensor

from spear_lightning.flow.rotation import RotationFlow
from spear_lightning.geometry import quaternions


class LinearRotation(RotationFlow):
    """Straight paths from a standard normal to the encoded rotation, with a mean squared error.

    The `geodesic` loss is zero: nothing ties a vector's path to a rotation before the end.
    """

    @abstractmethod
    def encode(self, q: Tensor) -> Tensor:
        """Map unit quaternions xyzw (..., 4) to vectors (..., width) (see `RotationFlow.encode`)."""

    @abstractmethod
    def decode(self, r: Tensor) -> Tensor:
        """Map any vectors (..., width) to unit quaternions xyzw (..., 4) (see `RotationFlow.decode`)."""

    def noise(
        self,
        shape: tuple[int, ...],
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Draw from a standard normal (*shape, width)."""
        return torch.randn((*shape, self.width), generator=generator, device=device, dtype=torch.float32)

    def path(self, noise: Tensor, target: Tensor, tau: Tensor) -> tuple[Tensor, Tensor]:
        """Return (1 - tau) noise + tau target and target - noise (see `RotationFlow.path`)."""
        tau = tau.unsqueeze(-1)
        return (1 - tau) * noise + tau * target, target - noise

    def step(self, r: Tensor, velocity: Tensor, dt: Tensor | float) -> Tensor:
        """Return r + velocity dt (see `RotationFlow.step`)."""
        return r + velocity * (dt.unsqueeze(-1) if isinstance(dt, Tensor) else dt)

    def losses(
        self, velocity: Tensor, noisy: Tensor, target_velocity: Tensor, tau: Tensor, step_size: float
    ) -> dict[str, Tensor]:
        """Return the mean squared error of the velocity, and a geodesic loss of zero."""
        error = (velocity - target_velocity).square().mean(-1)
        return {"velocity": error, "geodesic": torch.zeros_like(error)}


class EuclideanQuaternionRotation(LinearRotation):
    """Quaternions xyzw with w >= 0 as vectors of R4; the end point is normalised. Width 4."""

    width = 4

    def encode(self, q: Tensor) -> Tensor:
        """Return the quaternions with w >= 0."""
        return quaternions.canonicalize(q)

    def decode(self, r: Tensor) -> Tensor:
        """Normalise; a zero vector is read as no rotation."""
        return quaternions.canonicalize(quaternions.normalize(r))


class EulerAngleRotation(LinearRotation):
    """Roll, pitch and yaw about fixed axes, divided by pi, as vectors of R3. Width 3."""

    width = 3

    def encode(self, q: Tensor) -> Tensor:
        """Return roll, pitch, yaw over pi: roll and yaw in [-1, 1], pitch in [-1/2, 1/2]."""
        return quaternions.to_euler_xyz_extrinsic(q) / math.pi

    def decode(self, r: Tensor) -> Tensor:
        """Read any three numbers as roll, pitch, yaw over pi."""
        return quaternions.canonicalize(quaternions.from_euler_xyz_extrinsic(r * math.pi))
