"""Pictures on validation: camera frames beside predicted and true end-effector paths over the chunk."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any, cast

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import MLFlowLogger, TensorBoardLogger

from spear_lightning.geometry import quaternions
from spear_lightning.geometry.poses import ChunkMode, chunk_to_poses

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from spear_lightning.training.vla_module import ValidationOutput, VLAModule


class ValidationPictures(Callback):
    """Draws the first samples of the first validation batch into TensorBoard and MLflow.

    A row a sample: its camera frames, the path seen from above (x, y) and from the side (x, z) in the robot's
    base frame in centimetres, the angle turned and the gripper's opening over the chunk.

    Args:
        samples: Rows of the picture.
    """

    def __init__(self, samples: int = 4) -> None:
        self.samples = samples

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Draw the first batch; the sanity check before training is left out."""
        if batch_idx > 0 or trainer.sanity_checking or not trainer.is_global_zero or not trainer.loggers:
            return
        policy = cast("VLAModule", pl_module).policy
        figure = draw_chunks(outputs, policy.require_interface().chunk_mode, self.samples)
        pixels = render(figure)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image("val/chunks", pixels, trainer.global_step, dataformats="HWC")
            elif isinstance(logger, MLFlowLogger) and logger.run_id is not None:
                name = f"validation/chunks_step_{trainer.global_step:07d}.png"
                logger.experiment.log_image(logger.run_id, pixels, artifact_file=name)


def draw_chunks(output: ValidationOutput, chunk_mode: ChunkMode, samples: int) -> Figure:
    """Return the picture described at `ValidationPictures`.

    Args:
        output: A validation batch with its sampled chunks.
        chunk_mode: "cumulative" or "per_step", what the chunks' targets are relative to.
        samples: Rows at most.
    """
    from matplotlib.figure import Figure

    batch = output["batch"].to("cpu")
    rows = min(samples, len(batch))
    cameras = list(batch.images)
    figure = Figure(figsize=(2.4 * (len(cameras) + 4), 2.2 * rows), layout="constrained")
    axes = figure.subplots(rows, len(cameras) + 4, squeeze=False)
    paths = {
        "true": (chunk_to_poses(batch.state, batch.actions, chunk_mode), batch.actions, "tab:green"),
        "predicted": (
            chunk_to_poses(batch.state, output["predicted"].float().cpu(), chunk_mode),
            output["predicted"].float().cpu(),
            "tab:red",
        ),
    }
    for row in range(rows):
        valid = batch.action_mask[row]
        for column, camera in enumerate(cameras):
            axes[row, column].imshow(batch.images[camera][row].permute(1, 2, 0).numpy())
            axes[row, column].set_axis_off()
            axes[row, column].set_title(camera if row == 0 else "", fontsize=7)
        axes[row, 0].set_title(batch.instructions[row][:48] or "(no instruction)", fontsize=7)
        for name, (poses_BH7, chunk_BH8, colour) in paths.items():
            start = batch.state[row, :7]
            poses = torch.cat([start[None], poses_BH7[row][valid]])
            centimetres = 100 * (poses[:, :3] - start[:3])
            turned = torch.rad2deg(quaternions.rotation_angle(start[None, 3:7], poses[:, 3:7]))
            opening = torch.cat([batch.state[row, 7:8], chunk_BH8[row, valid, 7]])
            style = {"color": colour, "marker": ".", "label": name, "linewidth": 1}
            plots = axes[row, len(cameras) :]
            plots[0].plot(centimetres[:, 0], centimetres[:, 1], **style)
            plots[1].plot(centimetres[:, 0], centimetres[:, 2], **style)
            plots[2].plot(turned, **style)
            plots[3].plot(opening, **style)
        titles = ("from above: x, y (cm)", "from the side: x, z (cm)", "angle turned (deg)", "gripper opening")
        for plot, title in zip(axes[row, len(cameras) :], titles, strict=True):
            plot.set_title(title if row == 0 else "", fontsize=7)
            plot.tick_params(labelsize=6)
        axes[row, -1].set_ylim(-0.1, 1.1)
    axes[0, -1].legend(fontsize=6)
    return figure


def render(figure: Figure) -> np.ndarray:
    """Return a figure as uint8 RGB (height, width, 3)."""
    from PIL import Image

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return np.asarray(Image.open(buffer).convert("RGB"))
