"""Flow matching of rotations on the sphere S3 of unit quaternions (spec section 8; paper, section 3)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from spear_lightning.errors import ConfigError
from spear_lightning.flow.rotation import RotationFlow
from spear_lightning.geometry import quaternions

Choice = TypeVar("Choice", bound=Callable[..., Any])

SLOWEST = 1e-3
"""Speeds (radians on the sphere per unit of tau) below this have no direction worth comparing.

It bounds the gradient of the cosine loss for a network whose output layer starts at zero.
"""


class SphereRotation(RotationFlow):
    """Great-circle paths between unit quaternions; the network predicts tangent vectors. Width 4.

    Args:
        hemisphere: "half_space": noise and data both have w >= 0, a geodesically convex half, so that the
            whole path has it too. "shortest": the path takes the shorter of the two arcs to q and -q, which
            is the geodesic of SO(3); points that come out with w < 0 are shown to the network as -q.
        velocity_loss: "cosine": 1 - cos of the angle between predicted and true velocity, which leaves the
            speed to the geodesic loss. "mse": mean squared error over the four components.
        geodesic_horizon: How far the predicted velocity is integrated for the geodesic loss. "next": one step
            of the sampler (at most to tau = 1); "end": to tau = 1, which weighs errors of the speed more.
        geodesic_distance: "sign_min": min |q_true -+ q_predicted|; "angle": the rotation angle between them.
        num_steps: Euler steps K that set the horizon 1/K of "next"; `None` takes those of the `ActionFlow`.
    """

    width = 4

    def __init__(
        self,
        hemisphere: Literal["half_space", "shortest"] = "half_space",
        velocity_loss: Literal["cosine", "mse"] = "cosine",
        geodesic_horizon: Literal["next", "end"] = "next",
        geodesic_distance: Literal["sign_min", "angle"] = "sign_min",
        num_steps: int | None = None,
    ) -> None:
        if num_steps is not None and num_steps < 1:
            raise ConfigError(
                "A sampler needs at least one step", where="flow.rotation.num_steps", found=num_steps
            )
        self._path = _choose("hemisphere", hemisphere, _PATHS)
        self._velocity_loss = _choose("velocity_loss", velocity_loss, _VELOCITY_LOSSES)
        self._horizon = _choose("geodesic_horizon", geodesic_horizon, _HORIZONS)
        self._distance = _choose("geodesic_distance", geodesic_distance, _DISTANCES)
        self.num_steps = num_steps

    def encode(self, q: Tensor) -> Tensor:
        """Return the quaternions with w >= 0 (see `RotationFlow.encode`)."""
        return quaternions.canonicalize(q)

    def decode(self, r: Tensor) -> Tensor:
        """Return unit quaternions with w >= 0 (see `RotationFlow.decode`)."""
        return quaternions.canonicalize(quaternions.normalize(r))

    def noise(
        self,
        shape: tuple[int, ...],
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Draw uniformly from the half of the sphere with w >= 0, hence uniform rotations."""
        return quaternions.random_unit(shape, generator, device, half_space=True)

    def path(self, noise: Tensor, target: Tensor, tau: Tensor) -> tuple[Tensor, Tensor]:
        """Return slerp(noise, target, tau) and its velocity (see `RotationFlow.path`)."""
        return self._path(noise, target, tau)

    def step(self, r: Tensor, velocity: Tensor, dt: Tensor | float) -> Tensor:
        """Walk along the tangential part of the velocity; a point that leaves the half-space is negated."""
        tangent = quaternions.project_tangent(r, velocity)
        # Normalising keeps rounding from adding up over steps.
        return quaternions.canonicalize(quaternions.normalize(_walk(r, tangent, dt)))

    def losses(
        self, velocity: Tensor, noisy: Tensor, target_velocity: Tensor, tau: Tensor, step_size: float
    ) -> dict[str, Tensor]:
        """Return the losses of direction and of the integrated rotation (see `RotationFlow.losses`).

        The component of the predicted velocity along the point itself is ignored, as the sampler ignores it.
        """
        tangent = quaternions.project_tangent(noisy, velocity)
        dt = self._horizon(1 - tau, 1 / self.num_steps if self.num_steps is not None else step_size)
        reached, true = _walk(noisy, tangent, dt), _walk(noisy, target_velocity, dt)
        return {
            "velocity": self._velocity_loss(tangent, target_velocity),
            "geodesic": self._distance(reached, true),
        }


def _walk(q: Tensor, tangent: Tensor, dt: Tensor | float) -> Tensor:
    # A number stays one: a tensor made of it would be copied to the GPU, which the process would wait for.
    return quaternions.exp(q, tangent * (dt.unsqueeze(-1) if isinstance(dt, Tensor) else dt))


def _half_space_path(noise: Tensor, target: Tensor, tau: Tensor) -> tuple[Tensor, Tensor]:
    q = quaternions.slerp(noise, target, tau)
    # Between two points with w = 0, rounding may leave the half-space by one part in ten million.
    q = torch.cat([q[..., :3], q[..., 3:].clamp(min=0)], dim=-1)
    return q, quaternions.slerp_velocity(noise, target, tau)


def _shortest_path(noise: Tensor, target: Tensor, tau: Tensor) -> tuple[Tensor, Tensor]:
    target = torch.where((noise * target).sum(-1, keepdim=True) < 0, -target, target)
    q = quaternions.slerp(noise, target, tau)
    sign = torch.where(q[..., 3:] < 0, -1.0, 1.0)
    return sign * q, sign * quaternions.slerp_velocity(noise, target, tau)


def _cosine_loss(velocity: Tensor, target: Tensor) -> Tensor:
    speed = torch.linalg.vector_norm(velocity, dim=-1)
    true_speed = torch.linalg.vector_norm(target, dim=-1)
    cosine = (velocity * target).sum(-1) / (speed.clamp(min=SLOWEST) * true_speed.clamp(min=SLOWEST))
    # Noise that is already at the target: every direction is as good as any other.
    return torch.where(true_speed < SLOWEST, torch.zeros_like(cosine), 1 - cosine)


def _squared_loss(velocity: Tensor, target: Tensor) -> Tensor:
    return (velocity - target).square().mean(-1)


def _sign_min_distance(q0: Tensor, q1: Tensor) -> Tensor:
    apart = torch.linalg.vector_norm(q0 - q1, dim=-1)
    return torch.minimum(apart, torch.linalg.vector_norm(q0 + q1, dim=-1))


def _horizon_next(remaining: Tensor, step_size: float) -> Tensor:
    # The sampler's last step ends at 1: a longer one would be judged beyond the data.
    return remaining.clamp(max=step_size)


def _horizon_end(remaining: Tensor, step_size: float) -> Tensor:
    return remaining


_PATHS = {"half_space": _half_space_path, "shortest": _shortest_path}
_VELOCITY_LOSSES = {"cosine": _cosine_loss, "mse": _squared_loss}
_HORIZONS = {"next": _horizon_next, "end": _horizon_end}
_DISTANCES = {"sign_min": _sign_min_distance, "angle": quaternions.rotation_angle}


def _choose(name: str, value: str, choices: dict[str, Choice]) -> Choice:
    if value not in choices:
        raise ConfigError(
            "Unknown choice of the flow on the sphere",
            where=f"flow.rotation.{name}",
            found=value,
            expected=" or ".join(choices),
        )
    return choices[value]
