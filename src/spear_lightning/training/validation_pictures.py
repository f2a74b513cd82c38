"""Pictures on validation: camera frames beside predicted and true end-effector paths over the chunk."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import lightning as L
import torch

from spear_lightning.geometry import quaternions
from spear_lightning.geometry.poses import ChunkMode, chunk_to_poses
from spear_lightning.training.first_batch_picture import FirstBatchPicture

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from spear_lightning.training.vla_module import ValidationOutput, VLAModule


class ValidationPictures(FirstBatchPicture):
    """Draws the first samples of the first validation batch into TensorBoard and MLflow.

    A row a sample: its camera frames, the path seen from above (x, y) and from the side (x, z) in the robot's
    base frame in centimetres, the angle turned and the gripper's opening over the chunk.

    Args:
        samples: Rows of the picture.
    """

    topic = "chunks"

    def __init__(self, samples: int = 4) -> None:
        super().__init__(samples)

    def draw(self, module: L.LightningModule, output: ValidationOutput) -> Figure:
        """Return the picture."""
        policy = cast("VLAModule", module).policy
        return draw_chunks(output, policy.require_interface().chunk_mode, self.samples)


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
