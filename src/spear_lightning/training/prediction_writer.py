"""`spear predict`: writes the predicted chunks to one file and says how good they are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from rich.table import Table
from torch import Tensor

from spear_lightning.batches import RobotBatch
from spear_lightning.training.chunk_errors import chunk_errors
from spear_lightning.training.prediction_file import PredictionFile


class PredictionWriter(PredictionFile[tuple[RobotBatch, Tensor]]):
    """Collects the chunks of all batches and writes `predictions.npz` (see `PredictionFile`).

    The file holds, for N samples and horizon H: `position` int64 (N,), `instruction` str (N,), `predicted` and
    `true` float32 (N, H, 8) in physical units, `mask` bool (N, H).
    """

    name = "predictions.npz"

    def keep(self, batch: RobotBatch, outputs: Tensor) -> tuple[RobotBatch, Tensor]:
        """Return what is small of a batch, and the chunks."""
        light = RobotBatch(
            images={},
            image_mask={},
            instructions=batch.instructions,
            state=batch.state,
            actions=batch.actions,
            action_mask=batch.action_mask,
            dataset=batch.dataset,
            position=batch.position,
        )
        return light.to("cpu"), outputs.float().cpu()

    def write(self, kept: list[tuple[RobotBatch, Tensor]], path: Path) -> None:
        """Write the arrays."""
        predicted, true, mask = _chunks(kept)
        np.savez_compressed(
            path,
            position=torch.cat([batch.position for batch, _ in kept]).numpy(),
            instruction=np.array([text for batch, _ in kept for text in batch.instructions]),
            predicted=predicted.numpy(),
            true=true.numpy(),
            mask=mask.numpy(),
        )

    def summary(self, kept: list[tuple[RobotBatch, Tensor]], path: Path) -> Table:
        """Return the table of errors."""
        return error_table(*_chunks(kept), path)


def _chunks(kept: list[tuple[RobotBatch, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """Return predicted and true chunks (N, H, 8) and their mask (N, H)."""
    return (
        torch.cat([chunk for _, chunk in kept]),
        torch.cat([batch.actions for batch, _ in kept]),
        torch.cat([batch.action_mask for batch, _ in kept]),
    )


def error_table(predicted_NH8: Tensor, true_NH8: Tensor, mask_NH: Tensor, path: Path) -> Table:
    """Return the table of errors per target of the chunk; targets without a valid sample are left out."""
    table = Table(title=f"{len(true_NH8)} chunks -> {path}")
    still_NH8 = torch.zeros_like(true_NH8)
    still_NH8[..., 6] = 1
    columns: Sequence[str] = (
        "target",
        "translation error (mm)",
        "of standing still",
        "rotation error (deg)",
        "of standing still",
        "gripper right",
    )
    for column in columns:
        table.add_column(column, justify="right")
    for target in range(true_NH8.shape[1]):
        one = slice(target, target + 1)
        if not bool(mask_NH[:, one].any()):
            continue
        errors = chunk_errors(predicted_NH8[:, one], true_NH8[:, one], mask_NH[:, one])
        still = chunk_errors(still_NH8[:, one], true_NH8[:, one], mask_NH[:, one])
        table.add_row(
            str(target + 1),
            f"{errors['translation_error_mm']:.1f}",
            f"{still['translation_error_mm']:.1f}",
            f"{errors['rotation_error_deg']:.2f}",
            f"{still['rotation_error_deg']:.2f}",
            f"{100 * errors['gripper_accuracy']:.0f} %",
        )
    return table
