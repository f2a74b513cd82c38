"""Training of a small MoGe: pictures to point maps, by MoGe's own kind of objective.

Shape letters: B images, H and W the image.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spear_lightning.batches import GeometryBatch
from spear_lightning.geometry.point_maps import PointMaps
from spear_lightning.models.encoders.moge_weights import read_moge
from spear_lightning.models.moge.base import Moge, MogeOutput
from spear_lightning.models.moge.camera import focal_from_widths, normalized_intrinsics, unproject
from spear_lightning.models.moge.loss import GeometryLoss, align_maps
from spear_lightning.policy.checkpoint import SCHEMA
from spear_lightning.training.base_module import SpearModule
from spear_lightning.training.image_augmentation import ImageAugmentation, require_no_crop
from spear_lightning.training.optimizer import OptimizerRecipe
from spear_lightning.training.random_streams import AUGMENT, TRAIN, generator_at

log = logging.getLogger(__name__)

WEIGHTS_FOLDER = "moge"
"""Folder, in that of the run, that the network is exported to."""

WEIGHTS_FILE = "model.safetensors"

ALIGNED_SIDE = 16
"""Points along each side of the grid by which validation aligns predictions."""


class GeometryModule(SpearModule):
    """LightningModule that trains a MoGe on pictures with depth.

    Each step draws the number of tokens from the network's range, as MoGe does, so that it serves images of
    several sizes; and flips half of the pictures. Logged while training: `train/loss` and its terms
    (`GeometryLoss`). On validation, besides these under `val/`: `val/point_error` (mean distance after the best
    scale and shift, as a share of the distance from the camera), `val/located_point_error` (the same of the points
    in the recovered camera, after the best scale alone), `val/fov_error_deg` (of the recovered horizontal field of
    view) and `val/mask_iou`.

    After every validation the network, with averaged weights where there are any, is written to
    `RUN/moge/model.safetensors` under the published names: for `weights` of `MogeV1` or `MogeV2`, and of
    `MogeEncoder` in a VLM or VLA.

    Args:
        moge: The network.
        recipe: Optimizer and learning-rate schedule.
        loss: The objective.
        seed: Seed of the flips, the changes of colour and the numbers of tokens.
        init_from: MoGe weights, published or ours, to start from.
        augmentation: Changes colours in training; its `crop` must be 1, since a crop would move the camera's axis.
    """

    def __init__(
        self,
        moge: Moge,
        recipe: OptimizerRecipe,
        loss: GeometryLoss | None = None,
        seed: int = 0,
        init_from: str | None = None,
        augmentation: ImageAugmentation | None = None,
    ) -> None:
        super().__init__(recipe, seed, init_from)
        require_no_crop(augmentation, "A crop would move the principal point out of the middle")
        self.moge = moge
        self.loss = GeometryLoss() if loss is None else loss
        self.augmentation = augmentation
        self._config: dict[str, Any] = {}

    @property
    def components(self) -> nn.Module:
        """The network: `encoder` and `parts` (the decoder)."""
        return self.moge

    def unused_parameters(self) -> list[str]:
        """Names of parameters that the loss never reaches: later blocks, and the head of normals."""
        names = [f"encoder.{name}" for name in self.moge.encoder.unused_parameters()]
        return names + [name for name, _ in self.moge.named_parameters() if name.startswith("parts.normal_head.")]

    def set_configuration(self, config: Mapping[str, Any]) -> None:
        """Keep the network's part of the configuration."""
        self._config = dict(config["init_args"]["moge"])

    def describe(self) -> dict[str, Any]:
        """Return the checkpoint's description of the network."""
        return {"schema": SCHEMA, "moge": self._config}

    def load_initial_weights(self) -> None:
        """Load the weights of `init_from`, or those that the network names."""
        if self.init_from is not None:
            self.moge.take(read_moge(self.init_from))
            log.info("Warm start from %s", self.init_from)
        else:
            self.moge.load_pretrained()

    def training_step(self, batch: GeometryBatch, batch_index: int) -> Tensor:
        """Return the loss of one batch."""
        step = self.trainer.fit_loop.total_batch_idx
        batch = self._augmented(batch, generator_at(self.seed, AUGMENT, step, self.global_rank, self.device))
        # All processes draw the same number: otherwise they would wait for the one with most tokens.
        low, high = self.moge.num_tokens_range
        tokens = int(torch.randint(low, high + 1, (), generator=generator_at(self.seed, TRAIN, step, 0, "cpu")))
        losses = self.loss(self.moge, self.moge(batch.images, tokens), *true_points(batch))
        self._log("train", losses, len(batch))
        return losses["total"]

    def validation_step(self, batch: GeometryBatch, batch_index: int) -> None:
        """Log the losses and errors of one batch."""
        output = self.moge(batch.images)
        true_BHW3, known_BHW = true_points(batch)
        losses = self.loss(self.moge, output, true_BHW3, known_BHW)
        errors = geometry_errors(output, self.moge.located(output), true_BHW3, known_BHW, batch.focal_x)
        self._log("val", {**losses, **errors}, len(batch))

    def test_step(self, batch: GeometryBatch, batch_index: int) -> None:
        """Do what validation does."""
        self.validation_step(batch, batch_index)

    def on_validation_epoch_end(self) -> None:
        """Export the network as it was validated."""
        if self.exports_now:
            self.moge.save(Path(self.trainer.default_root_dir) / WEIGHTS_FOLDER / WEIGHTS_FILE)

    def _augmented(self, batch: GeometryBatch, generator: torch.Generator) -> GeometryBatch:
        flip_B = torch.rand(len(batch), generator=generator, device=self.device) < 0.5
        images = torch.where(flip_B[:, None, None, None], batch.images.flip(-1), batch.images)
        depth = torch.where(flip_B[:, None, None], batch.depth.flip(-1), batch.depth)
        if self.augmentation is not None:
            images = self.augmentation.images(images, generator)
        return replace(batch, images=images, depth=depth)

    def _log(self, stage: str, values: Mapping[str, Tensor], count: int) -> None:
        validating = stage != "train"
        for name, value in values.items():
            self.log(
                f"{stage}/{'loss' if name == 'total' else name}",
                value.detach(),
                # Lightning reads such values in every step, and waits for the GPU.
                prog_bar=validating and name == "total",
                batch_size=count,
                sync_dist=validating,
                on_step=not validating,
                on_epoch=validating,
            )


def true_points(batch: GeometryBatch) -> tuple[Tensor, Tensor]:
    """Return the true points (B, H, W, 3), metres, and where there are any (B, H, W)."""
    height, width = batch.depth.shape[1:]
    known_BHW = batch.depth.isfinite()
    intrinsics_B4 = normalized_intrinsics(focal_from_widths(batch.focal_x, width / height), width / height)
    return unproject(torch.where(known_BHW, batch.depth, 1.0), intrinsics_B4), known_BHW


def geometry_errors(
    output: MogeOutput, maps: PointMaps, true_BHW3: Tensor, known_BHW: Tensor, focal_x_B: Tensor
) -> dict[str, Tensor]:
    """Compare predictions with the truth (see `GeometryModule`).

    Args:
        output: What the network says.
        maps: The same in the recovered cameras.
        true_BHW3: True points.
        known_BHW: bool, where there are any.
        focal_x_B: True focal lengths in image widths.
    """
    distance_BHW = torch.linalg.vector_norm(true_BHW3, dim=-1)
    aligned = align_maps(output.points, true_BHW3, known_BHW, ALIGNED_SIDE).apply(output.points)
    error_BHW = torch.linalg.vector_norm(aligned - true_BHW3, dim=-1) / distance_BHW
    both_BHW = maps.valid & known_BHW
    ratio_BHW = torch.where(both_BHW, true_BHW3[..., 2] / maps.points[..., 2], torch.nan)
    scale_B = ratio_BHW.flatten(1).nanmedian(dim=1).values
    located = (
        torch.linalg.vector_norm(scale_B[:, None, None, None] * maps.points - true_BHW3, dim=-1) / distance_BHW
    )
    fields = [torch.rad2deg(2 * torch.atan(0.5 / focal)) for focal in (maps.intrinsics[:, 0], focal_x_B)]
    return {
        "point_error": error_BHW[known_BHW].mean(),
        "located_point_error": located[both_BHW].mean(),
        "fov_error_deg": (fields[0] - fields[1]).abs().mean(),
        "mask_iou": both_BHW.sum() / (maps.valid | known_BHW).sum().clamp(min=1),
    }
