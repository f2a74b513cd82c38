"""Physical units <-> what the network sees: one object with both directions, its statistics in the checkpoint.

Spec section 9 (global quantile normalisation): one pair of quantiles over the whole mixture for
translations, so that the model learns motion and not which dataset it sees. Rotations stay on S3.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from spear_lightning.batches import STATE_WIDTH
from spear_lightning.errors import CheckpointError, ConfigError, ShapeError

SMALLEST_SPAN_M = 1e-4
"""An axis that moves less than this over all data would be blown up to noise; refused in `fit`."""


class ActionNormalizer(nn.Module):
    """Maps actions and states [x, q, g] to network units and back.

    Positions and translations map their quantiles [low, high] to [-1, 1]; quaternions are untouched;
    gripper openness [0, 1] maps to [-1, 1]. The statistics are buffers, hence part of every checkpoint.

    Args:
        clamp: Largest absolute normalised translation or position; beyond it values are cut. `None` keeps
            the tails (1 % on either side lies outside [-1, 1] by definition of the quantiles).
    """

    translation_low: Tensor
    translation_high: Tensor
    position_low: Tensor
    position_high: Tensor
    fitted: Tensor

    def __init__(self, clamp: float | None = 1.5) -> None:
        super().__init__()
        if clamp is not None and clamp < 1:
            raise ConfigError(
                "The normaliser's clamp would cut ordinary values",
                where="normalizer.clamp",
                found=clamp,
                expected="at least 1, or null for no clamping",
            )
        self.clamp = clamp
        for name in ("translation_low", "translation_high", "position_low", "position_high"):
            self.register_buffer(name, torch.full((3,), float("nan")))
        self.register_buffer("fitted", torch.tensor(False))

    def fit(
        self,
        translation_low: Sequence[float],
        translation_high: Sequence[float],
        position_low: Sequence[float],
        position_high: Sequence[float],
    ) -> None:
        """Set the statistics.

        Args:
            translation_low: 1 % quantile of chunk translations per axis, metres, base frame (3).
            translation_high: 99 % quantile, likewise.
            position_low: 1 % quantile of end-effector positions per axis, metres, base frame (3).
            position_high: 99 % quantile, likewise.

        Raises:
            ConfigError: If a width is not 3, a value is not finite, or an axis does not move.
        """
        bounds = {
            "translation": (translation_low, translation_high),
            "position": (position_low, position_high),
        }
        for name, (low, high) in bounds.items():
            low_3 = torch.as_tensor(low, dtype=torch.float32)
            high_3 = torch.as_tensor(high, dtype=torch.float32)
            valid = low_3.shape == (3,) and high_3.shape == (3,) and bool((low_3 + high_3).isfinite().all())
            if not valid or not bool((high_3 - low_3 >= SMALLEST_SPAN_M).all()):
                raise ConfigError(
                    f"The {name} statistics cannot be used for normalisation",
                    where=f"{name} quantiles",
                    found=f"low {list(low)}, high {list(high)}",
                    expected=f"three finite axes that each span at least {SMALLEST_SPAN_M} m",
                    remedy="look at the data with `spear data show`, then compute the statistics again",
                )
            getattr(self, f"{name}_low").copy_(low_3)
            getattr(self, f"{name}_high").copy_(high_3)
        self.fitted.fill_(True)

    def set_identity(self) -> None:
        """Make normalisation of positions the identity: to be asked for by name, never a silent default."""
        self.fit([-1.0] * 3, [1.0] * 3, [-1.0] * 3, [1.0] * 3)

    def normalize_actions(self, actions_BH8: Tensor) -> Tensor:
        """Map actions [x m, q xyzw, g in 0..1] (..., 8) to network units (..., 8)."""
        return self._map(actions_BH8, "translation", inverse=False)

    def unnormalize_actions(self, actions_BH8: Tensor) -> Tensor:
        """Map network units (..., 8) to actions [x m, q xyzw, g in 0..1] (..., 8)."""
        return self._map(actions_BH8, "translation", inverse=True)

    def normalize_state(self, state_B8: Tensor) -> Tensor:
        """Map states [x m, q xyzw, g in 0..1] (..., 8) to network units (..., 8)."""
        return self._map(state_B8, "position", inverse=False)

    def unnormalize_state(self, state_B8: Tensor) -> Tensor:
        """Map network units (..., 8) to states [x m, q xyzw, g in 0..1] (..., 8)."""
        return self._map(state_B8, "position", inverse=True)

    def _map(self, values: Tensor, kind: str, inverse: bool) -> Tensor:
        if values.shape[-1] != STATE_WIDTH:
            raise ShapeError(
                "Actions and states have eight numbers [x, q, g]", found=tuple(values.shape), expected="(..., 8)"
            )
        low, high = getattr(self, f"{kind}_low"), getattr(self, f"{kind}_high")
        position, quaternion, gripper = values.split([3, 4, 1], dim=-1)
        if inverse:
            position = (position + 1) / 2 * (high - low) + low
            gripper = (gripper + 1) / 2
        else:
            position = 2 * (position - low) / (high - low) - 1
            if self.clamp is not None:
                position = position.clamp(-self.clamp, self.clamp)
            gripper = 2 * gripper - 1
        return torch.cat([position, quaternion, gripper], dim=-1)

    def require_fitted(self) -> None:
        """Raise unless statistics are present; called once before training or prediction, not per step.

        Raises:
            CheckpointError: If the statistics were neither computed nor loaded.
        """
        if not bool(self.fitted):
            raise CheckpointError(
                "The policy has no normalisation statistics",
                where="normalizer buffers",
                remedy="load a trained checkpoint, train with a data module, or call set_identity() on purpose",
            )
