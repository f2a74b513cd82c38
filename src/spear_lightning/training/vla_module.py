"""Training of SPEAR-1: flow matching on action chunks (spec sections 7, 8 and 11)."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, TypedDict

from torch import Tensor, nn

from spear_lightning.batches import RobotBatch
from spear_lightning.errors import CheckpointError, ConfigError
from spear_lightning.models import PromptTokenizer
from spear_lightning.policy import Policy, describe_policy
from spear_lightning.policy.answerer_files import load_vlm
from spear_lightning.policy.checkpoint import (
    check_policy_weights,
    load_policy_weights,
    policy_weights,
    read_checkpoint,
)
from spear_lightning.training.augmentation import Augmentation
from spear_lightning.training.base_module import SpearModule
from spear_lightning.training.chunk_errors import chunk_errors
from spear_lightning.training.optimizer import OptimizerRecipe
from spear_lightning.training.random_streams import AUGMENT, PREDICT, TRAIN, VALIDATE, generator_at

log = logging.getLogger(__name__)


class ValidationOutput(TypedDict):
    """One validation batch with what the policy predicts for it: B samples, H horizon.

    Attributes:
        batch: The samples, physical units.
        predicted: float32 (B, H, 8) sampled chunks, physical units.
    """

    batch: RobotBatch
    predicted: Tensor


class VLAModule(SpearModule):
    """LightningModule that trains a `Policy` by flow matching.

    Logged while training: `train/loss` and its parts (`translation`, `rotation`, `rotation_velocity`,
    `rotation_geodesic`, `gripper`). On validation, besides the same parts under `val/`: the errors of a sampled
    chunk, `val/translation_error_mm`, `val/rotation_error_deg` and `val/gripper_accuracy`, over valid targets.

    Args:
        policy: What is trained.
        recipe: Optimizer and learning-rate schedule.
        seed: Seed of noise and flow time.
        init_from: Checkpoint of a policy to take weights from (averaged ones where it has them); only at the
            start of a new run.
        validation_steps: Euler steps when sampling on validation; `null` takes the flow's own number.
        flow_samples: Draws of noise and flow time for every sample of a training batch (see `Policy.losses`).
        augmentation: Changes samples in training; `null` leaves them as they are.
        vlm: SPEAR-VLM whose network the policy starts from: checkpoint (averaged weights where it has them),
            exported folder or hub id. It replaces the encoders' and PaliGemma's own weights; only at the start of
            a new run.
    """

    def __init__(
        self,
        policy: Policy,
        recipe: OptimizerRecipe,
        seed: int = 0,
        init_from: str | None = None,
        validation_steps: int | None = None,
        flow_samples: int = 1,
        augmentation: Augmentation | None = None,
        vlm: str | None = None,
    ) -> None:
        super().__init__(recipe, seed, init_from)
        if vlm is not None and init_from is not None:
            raise ConfigError(
                "Weights come from two places",
                where="model.vlm and model.init_from",
                found=f"{vlm} and {init_from}",
                remedy="`init_from` has the VLM's weights already; set one of them",
            )
        if flow_samples < 1:
            raise ConfigError(
                "A sample needs a draw of noise",
                where="model.flow_samples",
                found=flow_samples,
                expected="1 or more",
            )
        self.policy = policy
        self.validation_steps = validation_steps
        self.flow_samples = flow_samples
        self.augmentation = augmentation
        self.vlm = vlm

    @property
    def components(self) -> nn.Module:
        """The network: `vlm` (encoders, projections, language model) and `expert`."""
        return self.policy.vla

    def entry(self) -> tuple[nn.Module, tuple[str, ...]]:
        """Return the policy, whose losses and samples steps ask for."""
        return self.policy, ("losses", "sample_chunk")

    def unused_parameters(self) -> list[str]:
        """Names of parameters that the action loss never reaches."""
        return self.policy.vla.unused_parameters()

    def set_configuration(self, config: Mapping[str, Any]) -> None:
        """Keep the policy's part of the configuration, from which a checkpoint can rebuild it."""
        self.policy.config = dict(config["init_args"]["policy"])

    def describe(self) -> dict[str, Any]:
        """Return the checkpoint's description of the policy."""
        return describe_policy(self.policy)

    def load_initial_weights(self) -> None:
        """Load pretrained weights of the parts that name some, or those of `vlm`, or all from `init_from`."""
        if self.vlm is not None:
            left_out = load_vlm(self.policy.vla.vlm, self.policy.prompt, self.vlm)
            log.info("The VLM starts from %s; left out: %s", self.vlm, ", ".join(left_out) or "nothing")
            return
        if self.init_from is None:
            self.policy.vla.vlm.load_pretrained()
            return
        checkpoint = read_checkpoint(self.init_from)
        trained = PromptTokenizer.from_json(checkpoint["spear"]["tokenizer"])
        self.policy.prompt.require_ids_of(trained, "checkpoint")
        weights = policy_weights(checkpoint, "ema")
        # Statistics belong to the data of the new run.
        own = self.policy.normalizer.state_dict(prefix="normalizer.")
        load_policy_weights(self.policy, {**weights, **own}, where=self.init_from)
        log.info(
            "Warm start from %s: %d tensors loaded, %d kept (normalisation statistics), 0 left out",
            self.init_from,
            len(weights) - len(own),
            len(own),
        )

    def setup(self, stage: str) -> None:
        """Take the interface and statistics from the data module at the start of a new run."""
        super().setup(stage)
        data = getattr(self.trainer, "datamodule", None)
        if data is not None and stage == "fit" and not self.resuming:
            statistics = data.statistics
            self.policy.normalizer.fit(
                statistics.translation_low,
                statistics.translation_high,
                statistics.position_low,
                statistics.position_high,
            )
            log.info(
                "Translations are normalised from %s..%s m to [-1, 1], as this run's data has them",
                statistics.translation_low,
                statistics.translation_high,
            )
        if data is not None and self.policy.interface is None:
            self.policy.interface = data.interface

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse another configuration, other cameras or chunks, another architecture; take the tokenizer.

        Raises:
            CheckpointError: If the checkpoint does not fit.
        """
        super().on_load_checkpoint(checkpoint)
        spear = checkpoint["spear"]
        own = self.policy.interface.to_dict() if self.policy.interface else None
        if own is not None and own != spear["interface"]:
            raise CheckpointError(
                "The data does not show and ask for what the policy was trained on",
                where="data.cameras, data.chunks",
                found=own,
                expected=spear["interface"],
                remedy="leave --config out, so that the checkpoint's own configuration is taken",
            )
        self.policy.prompt = PromptTokenizer.from_json(spear["tokenizer"])
        check_policy_weights(self.policy, policy_weights(checkpoint, "raw"), where="--ckpt_path")

    def on_fit_start(self) -> None:
        """Check that the normaliser has statistics before a step is wasted; a checkpoint may come later."""
        if not self.resuming:
            self.policy.normalizer.require_fitted()

    def training_step(self, batch: RobotBatch, batch_index: int) -> Tensor:
        """Return the loss of one batch."""
        step = self.trainer.fit_loop.total_batch_idx
        if self.augmentation is not None:
            batch = self.augmentation(batch, generator_at(self.seed, AUGMENT, step, self.global_rank, self.device))
        losses = self._losses(batch, "train", TRAIN, step)
        return losses["total"]

    def validation_step(self, batch: RobotBatch, batch_index: int) -> ValidationOutput:
        """Log the losses of one batch and the errors of sampled chunks."""
        self._losses(batch, "val", VALIDATE, batch_index)
        predicted = self.predict_step(batch, batch_index)
        self._log_errors(predicted, batch)
        return ValidationOutput(batch=batch, predicted=predicted)

    def test_step(self, batch: RobotBatch, batch_index: int) -> ValidationOutput:
        """Do what validation does."""
        return self.validation_step(batch, batch_index)

    def predict_step(self, batch: RobotBatch, batch_index: int) -> Tensor:
        """Sample chunks (B, H, 8) in physical units; the noise depends on seed, batch and rank alone."""
        generator = generator_at(self.seed, PREDICT, batch_index, self.global_rank, self.device)
        return self.policy.sample_chunk(batch, generator, self.validation_steps)

    def _losses(self, batch: RobotBatch, stage: str, stream: int, step: int) -> dict[str, Tensor]:
        generator = generator_at(self.seed, stream, step, self.global_rank, self.device)
        losses = self.policy.losses(batch, generator, self.flow_samples if stage == "train" else 1)
        named = {f"{stage}/{'loss' if name == 'total' else name}": value for name, value in losses.items()}
        validating = stage != "train"
        for name, value in named.items():
            self.log(
                name,
                value.detach(),
                # Lightning reads such values in every step, and waits for the GPU.
                prog_bar=validating and name == f"{stage}/loss",
                batch_size=len(batch),
                sync_dist=validating,
                on_step=not validating,
                on_epoch=validating,
            )
        return losses

    def _log_errors(self, predicted_BH8: Tensor, batch: RobotBatch) -> None:
        errors = chunk_errors(predicted_BH8, batch.actions, batch.action_mask)
        # Every sample has a valid target, so every process logs.
        valid = int(batch.action_mask.sum())
        self.log_dict(
            {f"val/{name}": value for name, value in errors.items()},
            batch_size=valid,
            sync_dist=True,
            on_step=False,
            on_epoch=True,
        )
