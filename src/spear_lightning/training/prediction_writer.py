"""`spear predict`: writes the predicted chunks to one file and says how good they are."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.table import Table
from torch import Tensor

from spear_lightning.batches import RobotBatch
from spear_lightning.training.vla_module import chunk_errors


class PredictionWriter(Callback):
    """Collects the chunks of all batches and writes `predictions.npz` into the run's folder.

    The file holds, for N samples and horizon H: `position` int64 (N,), `instruction` str (N,), `predicted` and
    `true` float32 (N, H, 8) in physical units, `mask` bool (N, H). With several processes each writes its own
    file, `predictions_RANK.npz`.
    """

    def __init__(self) -> None:
        self._rows: list[tuple[RobotBatch, Tensor]] = []

    def on_predict_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep what is small of a batch."""
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
        self._rows.append((light.to("cpu"), outputs.float().cpu()))

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the file and print the errors."""
        if not self._rows:
            return
        batches = [batch for batch, _ in self._rows]
        predicted = torch.cat([chunk for _, chunk in self._rows])
        true = torch.cat([batch.actions for batch in batches])
        mask = torch.cat([batch.action_mask for batch in batches])
        suffix = f"_{trainer.global_rank}" if trainer.world_size > 1 else ""
        path = Path(trainer.default_root_dir) / f"predictions{suffix}.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.tmp.npz")
        np.savez_compressed(
            temporary,
            position=torch.cat([batch.position for batch in batches]).numpy(),
            instruction=np.array([text for batch in batches for text in batch.instructions]),
            predicted=predicted.numpy(),
            true=true.numpy(),
            mask=mask.numpy(),
        )
        os.replace(temporary, path)
        self._rows = []
        if trainer.is_global_zero:
            Console().print(summary(predicted, true, mask, path))


def summary(predicted_NH8: Tensor, true_NH8: Tensor, mask_NH: Tensor, path: Path) -> Table:
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
