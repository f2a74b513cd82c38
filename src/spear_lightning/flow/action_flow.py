"""Flow matching on action chunks: noise, path, losses and sampler on R3 x S3 x R (spec section 8).

Shape letters: B batch, H horizon, A numbers of an action in network space.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from spear_lightning.errors import ConfigError, ShapeError
from spear_lightning.flow.rotation import RotationFlow
from spear_lightning.flow.sphere import SphereRotation
from spear_lightning.flow.times import BetaTime, FlowTime

ACTION_WIDTH = 8
"""Numbers in an action: translation 3, quaternion xyzw 4, gripper 1."""


@dataclass
class FlowSample:
    """A point on the path from noise to data; all float32, actions in network space.

    Attributes:
        noisy: (B, H, A) the chunk at time tau: what the network sees.
        tau: (B,) flow times in [0, 1), 0 = noise, 1 = data; one for all actions of a chunk.
        velocity: (B, H, A) d noisy / d tau: what the network should predict.
        clean: (B, H, A) the chunk at tau = 1.
        noise: (B, H, A) the chunk at tau = 0.
    """

    noisy: Tensor
    tau: Tensor
    velocity: Tensor
    clean: Tensor
    noise: Tensor


class ActionFlow:
    """The flow over action chunks that a network's velocities belong to. It has no weights.

    An action in network space is [translation 3 | rotation `rotation.width` | gripper 1], normalised.
    Translation and gripper move on straight lines from a standard normal; the rotation as `rotation` says.

    The loss is the sum, each part averaged over the actions that count and over its components:
    `translation_weight` x translation + rotation + `gripper_weight` x gripper, where rotation is
    `rotation_velocity_weight` x velocity + `rotation_geodesic_weight` x geodesic.

    Args:
        rotation: The flow of rotations; `None` takes `SphereRotation()`.
        time: The distribution of flow times in training; `None` takes `BetaTime()`.
        num_steps: Euler steps of the sampler.
        translation_weight: Weight of the squared error of the translation's velocity.
        rotation_velocity_weight: Weight of the rotation's velocity loss.
        rotation_geodesic_weight: Weight of the rotation's geodesic loss.
        gripper_weight: Weight of the squared error of the gripper's velocity.

    Raises:
        ConfigError: If there is no step, or a weight is negative.
    """

    def __init__(
        self,
        rotation: RotationFlow | None = None,
        time: FlowTime | None = None,
        num_steps: int = 10,
        translation_weight: float = 1.0,
        rotation_velocity_weight: float = 1.0,
        rotation_geodesic_weight: float = 1.0,
        gripper_weight: float = 1.0,
    ) -> None:
        weights = {
            "translation_weight": translation_weight,
            "rotation_velocity_weight": rotation_velocity_weight,
            "rotation_geodesic_weight": rotation_geodesic_weight,
            "gripper_weight": gripper_weight,
        }
        for name, weight in weights.items():
            if not 0 <= weight < float("inf"):
                raise ConfigError(
                    "A loss weight cannot be used",
                    where=name,
                    found=weight,
                    expected="finite, at least 0",
                )
        self.rotation = rotation if rotation is not None else SphereRotation()
        self.time = time if time is not None else BetaTime()
        self.num_steps = _check_steps(num_steps)
        self.translation_weight = translation_weight
        self.rotation_velocity_weight = rotation_velocity_weight
        self.rotation_geodesic_weight = rotation_geodesic_weight
        self.gripper_weight = gripper_weight

    @property
    def width(self) -> int:
        """Numbers A of an action in network space."""
        return 3 + self.rotation.width + 1

    def encode(self, actions_BH8: Tensor) -> Tensor:
        """Map normalised actions [x, q xyzw, g] (..., 8) to network space (..., A), float32.

        Raises:
            ShapeError: If an action has not eight numbers.
        """
        if actions_BH8.shape[-1] != ACTION_WIDTH:
            raise ShapeError(
                "Actions have eight numbers [x, q, g]",
                where="flow actions",
                found=tuple(actions_BH8.shape),
                expected="(..., 8)",
            )
        translation, quaternion, gripper = actions_BH8.float().split([3, 4, 1], dim=-1)
        return torch.cat([translation, self.rotation.encode(quaternion), gripper], dim=-1)

    def decode(self, network_BHA: Tensor) -> Tensor:
        """Map network space (..., A) to normalised actions (..., 8) with unit quaternions, w >= 0."""
        translation, rotation, gripper = self._split(network_BHA, "network actions")
        return torch.cat([translation, self.rotation.decode(rotation), gripper], dim=-1)

    def noise(
        self,
        shape: tuple[int, ...],
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Draw starting points (*shape, A) of the flow, float32."""
        normal = torch.randn((*shape, 4), generator=generator, device=device, dtype=torch.float32)
        rotation = self.rotation.noise(shape, generator, device)
        return torch.cat([normal[..., :3], rotation, normal[..., 3:]], dim=-1)

    def sample_path(self, actions_BH8: Tensor, generator: torch.Generator | None = None) -> FlowSample:
        """Draw noise and time for a batch of chunks, and go that far along the path.

        Args:
            actions_BH8: (B, H, 8) normalised actions [x, q xyzw, g].
            generator: Source of randomness, on the actions' device.

        Returns:
            What the network sees, and what it should predict.
        """
        device = actions_BH8.device
        with torch.autocast(device.type, enabled=False):
            clean_BHA = self.encode(actions_BH8)
            noise_BHA = self.noise(tuple(actions_BH8.shape[:-1]), generator, device)
            tau_B = self.time.sample((actions_BH8.shape[0],), generator, device)
            noisy_BHA, velocity_BHA = self._path(noise_BHA, clean_BHA, tau_B)
        return FlowSample(noisy_BHA, tau_B, velocity_BHA, clean_BHA, noise_BHA)

    def _path(self, noise_BHA: Tensor, clean_BHA: Tensor, tau_B: Tensor) -> tuple[Tensor, Tensor]:
        tau_B1 = tau_B.unsqueeze(-1)
        noise_x, noise_r, noise_g = self._split(noise_BHA, "noise")
        clean_x, clean_r, clean_g = self._split(clean_BHA, "clean actions")
        noisy_r, velocity_r = self.rotation.path(noise_r, clean_r, tau_B1)
        tau_B11 = tau_B1.unsqueeze(-1)
        noisy_x, noisy_g = torch.lerp(noise_x, clean_x, tau_B11), torch.lerp(noise_g, clean_g, tau_B11)
        return (
            torch.cat([noisy_x, noisy_r, noisy_g], dim=-1),
            torch.cat([clean_x - noise_x, velocity_r, clean_g - noise_g], dim=-1),
        )

    def losses(self, velocity_BHA: Tensor, sample: FlowSample, mask_BH: Tensor) -> dict[str, Tensor]:
        """Compare predicted velocities with the true ones, in float32 even under autocast.

        Args:
            velocity_BHA: (B, H, A) predicted velocities, any floating-point type.
            sample: What they were predicted from.
            mask_BH: bool (B, H), True where an action counts. If none does, all losses are zero.

        Returns:
            Scalars: `total`, and its parts `translation`, `rotation` (= its two parts, weighted),
            `rotation_velocity`, `rotation_geodesic` and `gripper` (unweighted).

        Raises:
            ShapeError: If the velocities or the mask do not fit the sample.
        """
        _check_shapes(velocity_BHA, sample, mask_BH)
        with torch.autocast(velocity_BHA.device.type, enabled=False):
            x, r, g = self._split(velocity_BHA.float(), "velocity")
            true_x, true_r, true_g = self._split(sample.velocity, "sample.velocity")
            noisy_r = self._split(sample.noisy, "sample.noisy")[1]
            rotation = self.rotation.losses(r, noisy_r, true_r, sample.tau.unsqueeze(-1), 1 / self.num_steps)
            losses = {
                "translation": _masked_mean((x - true_x).square().mean(-1), mask_BH),
                "rotation_velocity": _masked_mean(rotation["velocity"], mask_BH),
                "rotation_geodesic": _masked_mean(rotation["geodesic"], mask_BH),
                "gripper": _masked_mean((g - true_g).square().mean(-1), mask_BH),
            }
            losses["rotation"] = (
                self.rotation_velocity_weight * losses["rotation_velocity"]
                + self.rotation_geodesic_weight * losses["rotation_geodesic"]
            )
            losses["total"] = (
                self.translation_weight * losses["translation"]
                + losses["rotation"]
                + self.gripper_weight * losses["gripper"]
            )
        return losses

    def sample(
        self,
        velocity: Callable[[Tensor, Tensor], Tensor],
        shape: tuple[int, int],
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        num_steps: int | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """Integrate a velocity field from noise to actions by Euler steps.

        Args:
            velocity: (noisy (B, H, A), tau (B,)) -> velocity (B, H, A).
            shape: (B, H).
            generator: Source of the noise, on `device`.
            device: Where to compute.
            num_steps: Euler steps K, at times 0, 1/K, ... (K - 1)/K; `None` takes the flow's own.
            noise: Where to start, (B, H, A) on `device`; `None` draws it.

        Returns:
            float32 (B, H, 8) normalised actions with unit quaternions xyzw, w >= 0.

        Raises:
            ConfigError: If there is no step.
        """
        steps = self.num_steps if num_steps is None else _check_steps(num_steps)
        state_BHA = self.noise(shape, generator, device) if noise is None else noise
        for index in range(steps):
            tau_B = state_BHA.new_full((shape[0],), index / steps)
            velocity_BHA = velocity(state_BHA, tau_B).float()
            with torch.autocast(state_BHA.device.type, enabled=False):
                state_BHA = self._step(state_BHA, velocity_BHA, 1 / steps)
        return self.decode(state_BHA)

    def _step(self, state_BHA: Tensor, velocity_BHA: Tensor, dt: float) -> Tensor:
        x, r, g = self._split(state_BHA, "state")
        velocity_x, velocity_r, velocity_g = self._split(velocity_BHA, "velocity")
        stepped_r = self.rotation.step(r, velocity_r, dt)
        return torch.cat([x + velocity_x * dt, stepped_r, g + velocity_g * dt], dim=-1)

    def _split(self, network_BHA: Tensor, what: str) -> tuple[Tensor, Tensor, Tensor]:
        if network_BHA.shape[-1] != self.width:
            raise ShapeError(
                "An action in network space has another width",
                where=what,
                found=tuple(network_BHA.shape),
                expected=f"(..., {self.width}): 3 translation + {self.rotation.width} rotation + 1 gripper",
            )
        translation, rotation, gripper = network_BHA.split([3, self.rotation.width, 1], dim=-1)
        return translation, rotation, gripper


def _masked_mean(values_BH: Tensor, mask_BH: Tensor) -> Tensor:
    kept_BH = torch.where(mask_BH, values_BH, torch.zeros_like(values_BH))
    return kept_BH.sum() / mask_BH.sum().clamp(min=1)


def _check_steps(num_steps: int) -> int:
    if num_steps < 1:
        raise ConfigError("A sampler needs at least one step", where="num_steps", found=num_steps, expected=">= 1")
    return num_steps


def _check_shapes(velocity_BHA: Tensor, sample: FlowSample, mask_BH: Tensor) -> None:
    # Both would otherwise broadcast to a plausible number.
    if velocity_BHA.shape != sample.velocity.shape or mask_BH.shape != sample.velocity.shape[:-1]:
        raise ShapeError(
            "Velocities, path and mask are not of one chunk",
            where="flow losses",
            found=f"velocity {tuple(velocity_BHA.shape)}, mask {tuple(mask_BH.shape)}",
            expected=f"velocity {tuple(sample.velocity.shape)}, mask {tuple(sample.velocity.shape[:-1])}",
        )
