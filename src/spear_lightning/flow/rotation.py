"""The interface of a flow over rotations, behind which the sphere and its baselines are interchangeable."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor


class RotationFlow(ABC):
    """A flow from noise to rotations, in whatever numbers the network sees (its "network space").

    Everything is float32, element-wise over leading dimensions (...), and tau broadcasts against them.

    Attributes:
        width: Numbers of a rotation in network space.
    """

    width: int

    @abstractmethod
    def encode(self, q: Tensor) -> Tensor:
        """Map unit quaternions xyzw (..., 4) of either sign to network space (..., width)."""

    @abstractmethod
    def decode(self, r: Tensor) -> Tensor:
        """Map network space (..., width) to unit quaternions xyzw (..., 4), w >= 0."""

    @abstractmethod
    def noise(
        self,
        shape: tuple[int, ...],
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Draw the flow's starting points (*shape, width), float32."""

    @abstractmethod
    def path(self, noise: Tensor, target: Tensor, tau: Tensor) -> tuple[Tensor, Tensor]:
        """Return the point at time tau on the path from noise to target, and its velocity there.

        Args:
            noise: (..., width) starting points at tau = 0, from `noise`.
            target: (..., width) end points at tau = 1, from `encode`.
            tau: (...) flow times in [0, 1].

        Returns:
            The points (..., width) and their velocities d/dtau (..., width).
        """

    @abstractmethod
    def step(self, r: Tensor, velocity: Tensor, dt: Tensor | float) -> Tensor:
        """Take one Euler step of the sampler.

        Args:
            r: (..., width) points.
            velocity: (..., width) predicted velocities, as they leave the network.
            dt: Step in flow time; a number, or (...).

        Returns:
            (..., width) points.
        """

    @abstractmethod
    def losses(
        self, velocity: Tensor, noisy: Tensor, target_velocity: Tensor, tau: Tensor, step_size: float
    ) -> dict[str, Tensor]:
        """Compare predicted with true velocities.

        Args:
            velocity: (..., width) predicted velocities, as they leave the network.
            noisy: (..., width) the points on the path they were predicted at.
            target_velocity: (..., width) true velocities there.
            tau: (...) flow times.
            step_size: Step of the sampler in flow time.

        Returns:
            `velocity`: (...), the error of the velocity; `geodesic`: (...), the error of the rotation that
            the velocity leads to, zero for flows that have no such term. Both unweighted.
        """
