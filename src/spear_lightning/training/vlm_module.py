"""Training of SPEAR-VLM: answers to 3D questions about images (spec sections 4, 5 and 11)."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, TypedDict

import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torchmetrics import MeanMetric

from spear_lightning.batches import VqaBatch
from spear_lightning.errors import CheckpointError, ConfigError
from spear_lightning.models.coordinate_rows import correlate_rows
from spear_lightning.policy.answerer import Answerer
from spear_lightning.policy.answerer_files import (
    PREFIX,
    describe_answerer,
    read_answerer,
    take_description,
)
from spear_lightning.policy.checkpoint import check_policy_weights, load_policy_weights, weights_under
from spear_lightning.training.base_module import SpearModule
from spear_lightning.training.labelled_image_data_module import LabelledImageDataModule
from spear_lightning.training.optimizer import OptimizerRecipe
from spear_lightning.vqa.metrics import AnswerMetrics, CoordinateAccuracy, TaskLosses

log = logging.getLogger(__name__)


class VqaValidationOutput(TypedDict):
    """One validation batch with what the model answers: B samples.

    Attributes:
        batch: The samples.
        texts: B answers, "" where one came to no end.
    """

    batch: VqaBatch
    texts: list[str]


class VLMModule(SpearModule):
    """LightningModule that trains an `Answerer` on questions about labelled images.

    The loss is the mean cross entropy of the answers' tokens, of which 3D tokens count lambda times as much.
    Logged while training: `train/loss`, its parts `train/words` and `train/coordinates` (means without lambda),
    `train/tokens`, the answers' tokens of a step, and `train/clamped`, for each 3D token of the answers how many
    numbers lay outside the range of 3D tokens. On validation, besides the losses under `val/` (there lambda is 1):
    `val/coordinate_accuracy` and `val/loss_TASK` given the true tokens before; and of answers that the
    model writes itself `val/parse_rate` and the errors of `vqa.metrics.MEASURES`, lengths in units of the data's
    `scale`.

    `coordinate_spread` and `coordinate_reach` are additions to the paper, off by default: they tell a model that
    starts from random weights, and has minutes, that 3D tokens are places on a line.

    Args:
        answerer: What is trained.
        recipe: Optimizer and learning-rate schedule.
        coordinate_weights: Optimizer step -> lambda from then on; begins at 0.
        coordinate_spread: Standard deviation, in bins, of the target of a 3D token in the training loss (see
            `models.answer_loss.NearBins`); 0: the true bin alone. Validation always takes the true bin.
        coordinate_reach: How far embeddings of 3D tokens start out like their neighbours', as a share of all bins
            (see `models.coordinate_rows`); 0: each row is drawn alone. Weights from `init_from` are left as
            they are.
        seed: Seed of the module's random numbers; there are none at present.
        init_from: SPEAR-VLM to take weights, tokenizer and the meaning of 3D tokens from: checkpoint (averaged
            weights where it has them), exported folder or hub id; only at the start of a new run.
    """

    def __init__(
        self,
        answerer: Answerer,
        recipe: OptimizerRecipe,
        coordinate_weights: dict[int, float] | None = None,
        coordinate_spread: float = 0.0,
        coordinate_reach: float = 0.0,
        seed: int = 0,
        init_from: str | None = None,
    ) -> None:
        super().__init__(recipe, seed, init_from)
        self.answerer = answerer
        self.coordinate_weights = {0: 1.0} if coordinate_weights is None else coordinate_weights
        if 0 not in self.coordinate_weights or min(self.coordinate_weights.values()) < 0:
            raise ConfigError(
                "The weights of 3D tokens in the loss are wrong",
                where="model.coordinate_weights",
                found=self.coordinate_weights,
                expected="optimizer step -> weight of at least 0, beginning at step 0",
            )
        if coordinate_spread < 0 or not 0 <= coordinate_reach <= 1:
            raise ConfigError(
                "3D tokens cannot be told to be neighbours in this way",
                where="model.coordinate_spread, model.coordinate_reach",
                found=(coordinate_spread, coordinate_reach),
                expected="a spread of at least 0 bins, and a reach in [0, 1]",
            )
        self.coordinate_spread, self.coordinate_reach = coordinate_spread, coordinate_reach
        # Made anew for every validation; not part of the network.
        self._metrics: dict[str, Any] = {}

    @property
    def components(self) -> nn.Module:
        """The network: `vlm` (encoders, projections, language model)."""
        return self.answerer

    def entry(self) -> tuple[nn.Module, tuple[str, ...]]:
        """Return the answerer, whose losses and answers steps ask for."""
        return self.answerer, ("losses", "predictions", "answer_batch")

    def unused_parameters(self) -> list[str]:
        """Names of parameters that no answer depends on."""
        encoders = self.answerer.vlm.vision_encoders()
        return [
            f"vlm.encoders.{name}.{part}"
            for name, encoder in encoders.items()
            for part in encoder.unused_parameters()
        ]

    def set_configuration(self, config: Mapping[str, Any]) -> None:
        """Keep the answerer's part of the configuration, from which a checkpoint can rebuild it."""
        self.answerer.config = dict(config["init_args"]["answerer"])

    def describe(self) -> dict[str, Any]:
        """Return the checkpoint's description of the answerer."""
        return describe_answerer(self.answerer)

    def load_initial_weights(self) -> None:
        """Load pretrained weights of the parts that name some, or everything from `init_from`."""
        if self.init_from is None:
            self.answerer.vlm.load_pretrained()
            rows = self.answerer.vlm.language_model.new_embeddings
            if self.coordinate_reach and rows is not None:
                correlate_rows(rows.weight, self.coordinate_reach)
            return
        stored = read_answerer(self.init_from)
        load_policy_weights(self.answerer, stored.weights, where=stored.where)
        take_description(self.answerer, {**stored.description, "cameras": {}})
        log.info("Warm start from %s: %d tensors loaded, 0 left out", stored.where, len(stored.weights))

    def setup(self, stage: str) -> None:
        """Give the data module the model's tokens; take its camera and, in a new run, the meaning of 3D tokens."""
        super().setup(stage)
        data = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, LabelledImageDataModule):
            return
        data.answerer = self.answerer
        self.answerer.cameras = dict(data.cameras)
        if stage == "fit" and not self.resuming and self.answerer.tokens is None:
            self.answerer.set_tokens(data.fit_tokens(self.answerer.vlm.language.new_tokens))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse another configuration, camera or architecture; take tokenizer and 3D tokens.

        Raises:
            CheckpointError: If the checkpoint does not fit.
        """
        super().on_load_checkpoint(checkpoint)
        spear = checkpoint["spear"]
        cameras = self.answerer.cameras
        own = None if cameras is None else {name: asdict(camera) for name, camera in cameras.items()}
        if own is not None and own != spear["cameras"]:
            raise CheckpointError(
                "The data does not show what the model was trained on",
                where="data.cameras",
                found=own,
                expected=spear["cameras"],
                remedy="leave --config out, so that the checkpoint's own configuration is taken",
            )
        take_description(self.answerer, spear)
        check_policy_weights(self.answerer, weights_under(checkpoint, PREFIX, "raw"), where="--ckpt_path")

    def coordinate_weight(self, step: int) -> float:
        """Return lambda at an optimizer step."""
        return self.coordinate_weights[max(start for start in self.coordinate_weights if start <= step)]

    def training_step(self, batch: VqaBatch, batch_index: int) -> Tensor:
        """Return the loss of one batch."""
        losses_T, is_coordinate_T = self.answerer.losses(batch, self.coordinate_spread)
        weight = self.coordinate_weight(self.trainer.global_step)
        count = losses_T.new_full((), len(losses_T))
        if self.trainer.world_size > 1:
            # Processes have different numbers of tokens: each token counts as much, wherever it is.
            count = self.trainer.strategy.reduce(count, reduce_op="mean")
        loss = torch.where(is_coordinate_T, weight * losses_T, losses_T).sum() / count.clamp(min=1)
        self.log("train/loss", loss.detach(), batch_size=len(batch))
        for name, mask_T in _kinds(is_coordinate_T).items():
            mean = (losses_T.detach() * mask_T).sum() / mask_T.sum().clamp(min=1)
            self.log(f"train/{name}", mean, batch_size=len(batch))
        self.log("train/tokens", count, batch_size=len(batch))
        clamped = batch.clamped.sum() / is_coordinate_T.sum().clamp(min=1)
        self.log("train/clamped", clamped, batch_size=len(batch))
        return loss

    def on_validation_epoch_start(self) -> None:
        """Start the figures anew."""
        self._metrics = {
            "answers": AnswerMetrics(self.answerer.require_tokens()).to(self.device),
            "accuracy": CoordinateAccuracy().to(self.device),
            **{name: MeanMetric().to(self.device) for name in ("loss", "coordinates", "words")},
        }
        data = getattr(self.trainer, "datamodule", None)
        if isinstance(data, LabelledImageDataModule):
            self._metrics["tasks"] = TaskLosses([task.path() for task in data.tasks.tasks]).to(self.device)

    def validation_step(self, batch: VqaBatch, batch_index: int) -> VqaValidationOutput:
        """Log the losses of one batch, and compare what the model answers."""
        found = self.answerer.predictions(batch)
        # Without lambda, so that stages can be compared; by tokens, however these lie in batches and processes.
        self._metrics["loss"].update(found.losses)
        for name, mask_T in _kinds(found.is_coordinate).items():
            self._metrics[name].update(found.losses, mask_T)
        self._metrics["accuracy"].update(found.most_likely, found.targets, found.is_coordinate)
        if "tasks" in self._metrics:
            self._metrics["tasks"].update(found.losses, batch, self.answerer.prompt.vocabulary.newline[-1])
        texts = self.answerer.answer_batch(batch)
        (pixels,) = batch.images.values()
        self._metrics["answers"].update(texts, batch.asked, *pixels.shape[-2:])
        return VqaValidationOutput(batch=batch, texts=texts)

    def on_validation_epoch_end(self) -> None:
        """Log the figures of all processes together."""
        figures = dict(self._metrics["answers"].compute())
        figures["coordinate_accuracy"] = self._metrics["accuracy"].compute()
        figures |= {name: self._metrics[name].compute() for name in ("loss", "coordinates", "words")}
        if "tasks" in self._metrics:
            figures |= {f"loss_{task}": loss for task, loss in self._metrics["tasks"].compute().items()}
        # They are the same in every process already.
        self.log_dict({f"val/{name}": value.float() for name, value in figures.items()}, sync_dist=False)

    def on_test_epoch_start(self) -> None:
        """Do what validation does."""
        self.on_validation_epoch_start()

    def test_step(self, batch: VqaBatch, batch_index: int) -> VqaValidationOutput:
        """Do what validation does."""
        return self.validation_step(batch, batch_index)

    def on_test_epoch_end(self) -> None:
        """Do what validation does."""
        self.on_validation_epoch_end()

    def predict_step(self, batch: VqaBatch, batch_index: int) -> list[str]:
        """Return the answers to the questions of every sample."""
        return self.answerer.answer_batch(batch)

    def prediction_writer(self) -> Callback:
        """Return what writes answers to a file."""
        from spear_lightning.training.answer_writer import AnswerWriter

        return AnswerWriter()


def _kinds(is_coordinate_T: Tensor) -> dict[str, Tensor]:
    return {"coordinates": is_coordinate_T, "words": ~is_coordinate_T}
