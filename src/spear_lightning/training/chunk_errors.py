"""How far predicted action chunks are from the true ones."""

from __future__ import annotations

import torch
from torch import Tensor

from spear_lightning.geometry import quaternions


def chunk_errors(predicted_BH8: Tensor, true_BH8: Tensor, mask_BH: Tensor) -> dict[str, Tensor]:
    """Compare chunks in physical units over valid targets.

    Args:
        predicted_BH8: float (B, H, 8) predicted [x m, q xyzw, gripper openness].
        true_BH8: float (B, H, 8), likewise.
        mask_BH: bool (B, H), True where a target counts; at least one must.

    Returns:
        Scalars: `translation_error_mm` (mean Euclidean distance), `rotation_error_deg` (mean rotation angle),
        `gripper_accuracy` (share on the right side of one half).
    """
    predicted, true = predicted_BH8[mask_BH].float(), true_BH8[mask_BH].float()
    distance = torch.linalg.vector_norm(predicted[:, :3] - true[:, :3], dim=-1)
    angle = quaternions.rotation_angle(predicted[:, 3:7], true[:, 3:7])
    gripper = (predicted[:, 7] > 0.5) == (true[:, 7] > 0.5)
    return {
        "translation_error_mm": 1000 * distance.mean(),
        "rotation_error_deg": torch.rad2deg(angle.mean()),
        "gripper_accuracy": gripper.float().mean(),
    }
