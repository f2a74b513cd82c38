"""What both stages' LightningModules share: optimizer, checkpoints, warm start, refusal of a wrong resume."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.enums import GradClipAlgorithmType
from torch import nn

from spear_lightning.errors import CheckpointError
from spear_lightning.training.configuration import differing_keys
from spear_lightning.training.meta_construction import loading_into_nothing
from spear_lightning.training.one_pass_adamw import OnePassAdamW
from spear_lightning.training.optimizer import OptimizerRecipe, freeze_unused

log = logging.getLogger(__name__)


class SpearModule(L.LightningModule):
    """Base of the VLM and VLA training modules.

    Two ways to start from a file are kept apart. *Resume* (`--ckpt_path`) continues the same run exactly and
    refuses another configuration. *Warm start* (`init_from`) takes weights only and reports what it took.

    Args:
        recipe: Optimizer and learning-rate schedule.
        seed: Seed of noise and time; together with step and rank it fixes every random number.
        init_from: Checkpoint to take weights from at the start of a new run.
    """

    def __init__(self, recipe: OptimizerRecipe, seed: int = 0, init_from: str | None = None) -> None:
        super().__init__()
        self.recipe = recipe
        self.seed = seed
        self.init_from = init_from
        # Set by the command line. Python users who pass `ckpt_path` to `Trainer.fit` may set `resuming` to spare
        # the loading of pretrained weights that the checkpoint replaces.
        self.run_config: dict[str, Any] | None = None
        self.resume_allow: list[str] = []
        self.resuming = False

    @property
    @abstractmethod
    def components(self) -> nn.Module:
        """The network; freeze patterns and parameter names are relative to it."""

    @abstractmethod
    def unused_parameters(self) -> list[str]:
        """Names, relative to `components`, of parameters that this stage's loss never reaches."""

    def entry(self) -> tuple[nn.Module, tuple[str, ...]]:
        """Return the module that steps call, and its methods that they call besides `forward`."""
        return self.components, ()

    @abstractmethod
    def load_initial_weights(self) -> None:
        """Load pretrained weights, then those of `init_from`; called once at the start of a new run."""

    @abstractmethod
    def set_configuration(self, config: Mapping[str, Any]) -> None:
        """Take note of the configuration (class path and arguments) that this module was built from."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Return plain values that, with the weights, suffice to rebuild the model."""

    @property
    def exports_now(self) -> bool:
        """Whether this process writes down what a validation within training has just validated."""
        fitting = self.trainer.state.fn == TrainerFn.FITTING and not self.trainer.sanity_checking
        return fitting and self.trainer.is_global_zero

    def prediction_writer(self) -> Callback:
        """Return the callback by which `spear predict` writes what was predicted."""
        from spear_lightning.training.prediction_writer import PredictionWriter

        return PredictionWriter()

    def setup(self, stage: str) -> None:
        """Load initial weights at the start of a new run; a resumed one gets them from its checkpoint."""
        if stage != "fit":
            return
        if not self.resuming:
            with loading_into_nothing():
                self.load_initial_weights()
        # Before the trainer wraps the module for several processes, which waits for all gradients.
        freeze_unused(self)

    def configure_model(self) -> None:
        """Divide the weights among processes where the strategy is one that does; the first has their values."""
        from spear_lightning.training.sharded_strategy import ShardedStrategy
        from spear_lightning.training.sharding import (
            give_values,
            is_sharded,
            let_frozen_parts_train_later,
            shard_blocks,
            values_of,
        )

        strategy = self.trainer.strategy
        root, methods = self.entry()
        if not isinstance(strategy, ShardedStrategy) or is_sharded(root):
            return
        values = values_of(root) if strategy.global_rank == 0 else None
        root.to("meta")
        compute_dtype = torch.bfloat16 if self.trainer.precision == "bf16-mixed" else None
        shard_blocks(root, methods, strategy.device_mesh, compute_dtype, strategy.reshard_after_forward)
        give_values(root, values, strategy.root_device)
        let_frozen_parts_train_later(root)

    def configure_optimizers(self) -> Any:
        """Build the optimizer and schedule from the recipe."""
        return self.recipe.configure(self)

    def on_train_start(self) -> None:
        """Let a resumed optimizer follow the configuration, where `resume_allow` lets that differ."""
        if self.resuming:
            self.recipe.renew(self)

    def configure_gradient_clipping(
        self,
        optimizer: Any,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip as the trainer says, before an optimizer of one kernel (`fused`) too.

        `OnePassAdamW` clips in its own step. Lightning refuses to clip before torch's fused optimizers in every
        mixed precision: they divide by float16's loss scale themselves, after the clipping. bfloat16 has no scale.
        """
        plugin = self.trainer.precision_plugin
        algorithm = GradClipAlgorithmType(gradient_clip_algorithm or "norm")
        # Other precisions, as those of Lightning's FSDP and DeepSpeed, have norms of their own.
        plain = type(plugin) in (Precision, MixedPrecision) and algorithm == GradClipAlgorithmType.NORM
        if plain and isinstance(optimizer, OnePassAdamW):
            if gradient_clip_val is not None and gradient_clip_val > 0:
                optimizer.clip(gradient_clip_val)
        elif isinstance(plugin, MixedPrecision) and plugin.scaler is None:
            Precision.clip_gradients(plugin, optimizer, gradient_clip_val or 0.0, algorithm)
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what makes the checkpoint self-sufficient."""
        checkpoint["spear"] = {**self.describe(), "run": self.run_config}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to continue a run under another configuration.

        Raises:
            CheckpointError: If the checkpoint is not ours or its configuration differs.
        """
        spear = checkpoint.get("spear")
        if not isinstance(spear, dict):
            raise CheckpointError(
                "The checkpoint was not written by this package and cannot be resumed",
                expected="an entry `spear`",
                remedy="to start a new run from its weights, use --model.init_from",
            )
        if self._trainer is None or not self.trainer.training:
            return
        check_same_configuration(spear.get("run"), self.run_config, self.resume_allow)


def check_same_configuration(
    saved: Mapping[str, Any] | None, current: Mapping[str, Any] | None, allow: list[str]
) -> None:
    """Compare the configuration of a checkpoint with the one about to continue it.

    Raises:
        CheckpointError: If a key that changes the training differs and is not allowed to.
    """
    if saved is None or current is None:
        return
    differing = differing_keys(saved, current)
    refused = {
        key: pair
        for key, pair in differing.items()
        if not any(key == name or key.startswith(name + ".") for name in allow)
    }
    if refused:
        rows = "\n".join(f"    {key}: {old!r} -> {new!r}" for key, (old, new) in sorted(refused.items()))
        raise CheckpointError(
            "The run to resume was started with another configuration",
            where="--ckpt_path",
            found=f"keys that differ (checkpoint -> now):\n{rows}",
            remedy="restore those values; or allow a change on purpose with "
            f"--resume_allow '[{', '.join(sorted(refused))}]'; or start a new run with --model.init_from",
        )
    for key, (old, new) in sorted(differing.items()):
        log.warning("Resuming with a changed configuration: %s: %r -> %r", key, old, new)
