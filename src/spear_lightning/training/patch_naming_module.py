"""Training of an encoder to name what its patches show, before a VLM reads it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MeanMetric

from spear_lightning.batches import IGNORED, NamedPatchBatch
from spear_lightning.errors import CheckpointError, ConfigError
from spear_lightning.models import PatchNamer
from spear_lightning.models.encoders.weight_files import load_exactly, read_state_dict
from spear_lightning.policy.checkpoint import SCHEMA, read_checkpoint, weights_under
from spear_lightning.training.base_module import SpearModule
from spear_lightning.training.image_augmentation import ImageAugmentation, require_no_crop
from spear_lightning.training.optimizer import OptimizerRecipe
from spear_lightning.training.patch_naming_data_module import PatchNamingDataModule
from spear_lightning.training.random_streams import AUGMENT, generator_at
from spear_lightning.training.sharded_strategy import ShardedStrategy

log = logging.getLogger(__name__)

WEIGHTS_FILE = Path("encoder") / "model.safetensors"
"""Where, in the folder of the run, the encoder is exported to."""

ENCODER = "namer.encoder."
"""What names of the encoder's parameters begin with in a checkpoint."""


class PatchNamingModule(SpearModule):
    """LightningModule that trains a `PatchNamer` by cross entropy; half of the pictures are flipped.

    Logged: `train/loss`, `val/loss`, and `val/patch_accuracy`, the share of the held-out patches with a known name
    that get it. After every validation the encoder, with averaged weights where there are any, is written to
    `RUN/encoder/model.safetensors`, for `weights` of the encoder in a VLM or VLA.

    Args:
        namer: Encoder and head.
        recipe: Optimizer and learning-rate schedule.
        nothing_weight: Weight in the loss of patches in which no object is.
        seed: Seed of the flips and the changes of colour.
        init_from: A checkpoint of this module, or the encoder's weights as it writes them, to start from; the head
            starts anew.
        augmentation: Changes colours in training; its `crop` must be 1, since names are those of fixed patches.
    """

    def __init__(
        self,
        namer: PatchNamer,
        recipe: OptimizerRecipe,
        nothing_weight: float = 0.2,
        seed: int = 0,
        init_from: str | None = None,
        augmentation: ImageAugmentation | None = None,
    ) -> None:
        super().__init__(recipe, seed, init_from)
        require_no_crop(augmentation, "A crop would move the patches")
        if nothing_weight < 0:
            raise ConfigError(
                "A weight is negative", where="model.nothing_weight", found=nothing_weight, expected=">= 0"
            )
        self.namer = namer
        self.nothing_weight = nothing_weight
        self.augmentation = augmentation
        self.names: list[str] = []
        # Made anew for every validation.
        self._mean_loss, self._accuracy = MeanMetric(), MeanMetric()
        self._config: dict[str, Any] = {}

    @property
    def components(self) -> nn.Module:
        """The network: `encoder` and `head`."""
        return self.namer

    def unused_parameters(self) -> list[str]:
        """Names of parameters that the loss never reaches."""
        return [f"encoder.{name}" for name in self.namer.encoder.unused_parameters()]

    def set_configuration(self, config: Mapping[str, Any]) -> None:
        """Keep the network's part of the configuration."""
        self._config = dict(config["init_args"]["namer"])

    def describe(self) -> dict[str, Any]:
        """Return the checkpoint's description of the network."""
        return {"schema": SCHEMA, "namer": self._config, "names": self.names}

    def load_initial_weights(self) -> None:
        """Load the encoder's weights from `init_from`, or those that it names."""
        if self.init_from is None:
            self.namer.encoder.load_pretrained()
            return
        if self.init_from.endswith(".ckpt"):
            state, where = weights_under(read_checkpoint(self.init_from), ENCODER, "ema"), self.init_from
        else:
            state, where = read_state_dict(self.init_from, (WEIGHTS_FILE.name,))
        load_exactly(self.namer.encoder, state, where)
        log.info("Warm start of the encoder from %s: %d tensors loaded, 0 left out", where, len(state))

    def setup(self, stage: str) -> None:
        """Ask the data for the names, and tell it the encoder's patches.

        Raises:
            ConfigError: If training would leave no encoder, or the strategy shards it.
        """
        super().setup(stage)
        if isinstance(self.trainer.strategy, ShardedStrategy):
            raise ConfigError(
                "So small a network is not sharded",
                where="trainer.strategy",
                found="ShardedStrategy",
                expected="ddp",
            )
        data = getattr(self.trainer, "datamodule", None)
        if isinstance(data, PatchNamingDataModule):
            self.names = data.prepare(self.namer.names, self.namer.encoder.patch_size)
            if stage == "fit" and not data.held_out_images():
                raise ConfigError(
                    "Nothing is held out, and the encoder is written after validations",
                    where="data.holdout",
                    found=data.holdout,
                    expected="a share that holds out at least one image",
                )

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse another configuration, and other names.

        Raises:
            CheckpointError: If the checkpoint does not fit.
        """
        super().on_load_checkpoint(checkpoint)
        saved = checkpoint["spear"]["names"]
        if self.names and self.names != saved:
            raise CheckpointError(
                "The data has other names than the model was trained on",
                where="--ckpt_path",
                found=f"names that only one of them has: {sorted(set(saved) ^ set(self.names))[:10]}",
                expected=f"the {len(saved)} names of the checkpoint",
                remedy="give the labels it was trained on, or start a new run with --model.init_from",
            )
        self.names = saved

    def training_step(self, batch: NamedPatchBatch, batch_index: int) -> Tensor:
        """Return the loss of one batch."""
        step = self.trainer.fit_loop.total_batch_idx
        batch = self._augmented(batch, generator_at(self.seed, AUGMENT, step, self.global_rank, self.device))
        loss, _ = self._loss(self.namer(batch.images), batch.names)
        self.log("train/loss", loss.detach(), batch_size=len(batch))
        return loss

    def validation_step(self, batch: NamedPatchBatch, batch_index: int) -> None:
        """Log the loss and the errors of one batch."""
        logits_BNK = self.namer(batch.images)
        loss, weight = self._loss(logits_BNK, batch.names)
        named_BN = batch.names > 0
        right_BN = named_BN & (logits_BNK.argmax(-1) == batch.names)
        self._mean_loss.update(loss, weight)
        self._accuracy.update(right_BN[named_BN].float())

    def test_step(self, batch: NamedPatchBatch, batch_index: int) -> None:
        """Do what validation does."""
        self.validation_step(batch, batch_index)

    def on_validation_epoch_start(self) -> None:
        """Start the figures anew."""
        self._mean_loss, self._accuracy = MeanMetric().to(self.device), MeanMetric().to(self.device)

    def on_test_epoch_start(self) -> None:
        """Do what validation does."""
        self.on_validation_epoch_start()

    def on_validation_epoch_end(self) -> None:
        """Log the figures of all processes together, and export the encoder as it was validated."""
        figures = {"val/loss": self._mean_loss.compute(), "val/patch_accuracy": self._accuracy.compute()}
        # They are the same in every process already.
        self.log_dict(figures, prog_bar=True, sync_dist=False)
        if self.exports_now:
            self.namer.save_encoder(Path(self.trainer.default_root_dir) / WEIGHTS_FILE)

    def on_test_epoch_end(self) -> None:
        """Do what validation does."""
        self.on_validation_epoch_end()

    def _loss(self, logits_BNK: Tensor, names_BN: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weighted mean of the losses, 0 where nothing is known, and the sum of the weights."""
        logits_TK, names_T = logits_BNK.flatten(0, 1).float(), names_BN.flatten()
        losses_T = F.cross_entropy(logits_TK, names_T, ignore_index=IGNORED, reduction="none")
        weight_T = torch.where(names_T == 0, self.nothing_weight, 1.0) * (names_T != IGNORED)
        total = weight_T.sum()
        return (losses_T * weight_T).sum() / total.clamp(min=1e-6), total

    def _augmented(self, batch: NamedPatchBatch, generator: torch.Generator) -> NamedPatchBatch:
        flip_B = torch.rand(len(batch), generator=generator, device=self.device) < 0.5
        images = torch.where(flip_B[:, None, None, None], batch.images.flip(-1), batch.images)
        grid = self.namer.encoder.grid(*batch.images.shape[-2:])
        mirrored_BN = batch.names.unflatten(1, grid).flip(-1).flatten(1)
        names = torch.where(flip_B[:, None], mirrored_BN, batch.names)
        if self.augmentation is not None:
            images = self.augmentation.images(images, generator)
        return replace(batch, images=images, names=names)
